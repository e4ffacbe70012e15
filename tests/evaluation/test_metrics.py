"""Metrics against closed forms and term-by-term sums."""

import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from lmvae_fast.evaluation import metrics


def _posteriors(count, width, seed=0):
    source = torch.Generator().manual_seed(seed)
    mu = torch.randn(count, width, generator=source, dtype=torch.float64)
    logvar = 0.5 * torch.randn(count, width, generator=source, dtype=torch.float64) - 1.0
    z = mu + torch.randn(count, width, generator=source, dtype=torch.float64) * torch.exp(0.5 * logvar)
    return z, mu, logvar


def test_kl_and_density_equal_torch_distributions():
    z, mu, logvar = _posteriors(7, 5)
    ours = Independent(Normal(mu, torch.exp(0.5 * logvar)), 1)
    prior = Independent(Normal(torch.zeros_like(mu), torch.ones_like(mu)), 1)
    torch.testing.assert_close(metrics.kl_divergence(mu, logvar), kl_divergence(ours, prior))
    torch.testing.assert_close(metrics.gaussian_log_density(z, mu, logvar), ours.log_prob(z))


def test_kl_near_the_prior_keeps_its_digits():
    # In float32 exp(lv) - lv - 1 would be 0; the Taylor series gives lv^2 / 4.
    kl = metrics.kl_divergence(torch.zeros(1, 1), torch.full((1, 1), 1e-5))
    assert float(kl) == pytest.approx(1e-10 / 4, rel=1e-4)


def test_active_units_counts_dimensions_by_the_variance_of_their_mean():
    # Variances (unbiased, two rows a apart: a^2/2): 0, just below, exactly at and above the threshold.
    below, at, above = 0.1399, math.sqrt(0.02) + 1e-9, 3.0
    mu = torch.tensor([[5.0, 0.0, 0.0, 0.0], [5.0, below, at, above]], dtype=torch.float64)
    assert metrics.active_units(mu) == 2
    assert metrics.active_units(mu, threshold=1.0) == 1
    # A large common offset must not leak into the variance.
    assert metrics.active_units(mu + 1e6) == 2
    with pytest.raises(ValueError, match="N >= 2"):
        metrics.active_units(mu[:1])


def test_mutual_information_of_separated_and_identical_posteriors():
    count = 37
    mu = 100.0 * torch.arange(count, dtype=torch.float64)[:, None].repeat(1, 3)
    logvar = torch.zeros_like(mu)
    z = mu + torch.randn_like(mu)
    # Each z can only come from its own sentence: log N.
    assert metrics.mutual_information(z, mu, logvar) == pytest.approx(math.log(count), abs=1e-9)
    same = torch.zeros_like(mu)
    assert metrics.mutual_information(torch.randn_like(mu), same, same) == pytest.approx(0.0, abs=1e-12)
    # Two groups of identical posteriors, far apart: log 2.
    halves = torch.where(torch.arange(40) < 20, 0.0, 50.0).double()[:, None]
    noise = torch.randn(40, 1, dtype=torch.float64)
    found = metrics.mutual_information(halves + noise, halves, torch.zeros_like(halves))
    assert found == pytest.approx(math.log(2), abs=1e-9)


def test_mutual_information_equals_the_sum_over_pairs():
    z, mu, logvar = _posteriors(19, 4)
    # Narrow posteriors far from the origin: the case in which expanded squares would lose digits.
    for shift, narrow in ((0.0, 0.0), (1e3, -12.0)):
        moved, variance = mu + shift, logvar + narrow
        sample = moved + (z - mu) * math.exp(0.5 * narrow)
        total = 0.0
        for i in range(19):
            log_q = torch.stack([metrics.gaussian_log_density(sample[i], moved[j], variance[j]) for j in range(19)])
            total += float(log_q[i] - (torch.logsumexp(log_q, 0) - math.log(19)))
        found = metrics.mutual_information(sample, moved, variance)
        assert found == pytest.approx(total / 19, abs=1e-8)


def test_total_correlation_and_dimension_wise_kl_equal_the_sums_over_pairs():
    z, mu, logvar = _posteriors(19, 4)
    pairs = Normal(mu, torch.exp(0.5 * logvar)).log_prob(z[:, None])  # [N, N, D]
    joint = torch.logsumexp(pairs.sum(-1), 1) - math.log(19)
    marginal = torch.logsumexp(pairs, 1) - math.log(19)
    prior = Normal(torch.zeros_like(z), torch.ones_like(z)).log_prob(z)
    per_dim = metrics.dimension_wise_kl(z, mu, logvar)
    torch.testing.assert_close(per_dim, (marginal - prior).mean(0), rtol=1e-12, atol=1e-12)
    found = metrics.total_correlation(z, mu, logvar)
    assert found == pytest.approx(float((joint - marginal.sum(-1)).mean()), abs=1e-12)
    # all three parts of the KL, at the same samples
    whole = float((Normal(mu, torch.exp(0.5 * logvar)).log_prob(z) - prior).sum(-1).mean())
    assert metrics.mutual_information(z, mu, logvar) + found + float(per_dim.sum()) == pytest.approx(whole, abs=1e-12)


def test_mutual_information_keeps_the_figures_of_the_expanded_products():
    """The sum over pairs by matrix products about the data's centre, which measured it before: the same to 1e-6."""
    z, mu, logvar = (x.float() for x in _posteriors(300, 32))
    own = metrics.gaussian_log_density(z, mu, logvar)
    centre = mu.double().mean(0)
    moved, means = z.double() - centre, mu.double() - centre
    precision = torch.exp(-logvar.double())
    constant = (means * means * precision + logvar + math.log(2 * math.pi)).sum(-1)
    log_q = -0.5 * (moved.square() @ precision.T - 2.0 * moved @ (means * precision).T + constant)
    expected = float((own - torch.logsumexp(log_q, 1) + math.log(300)).mean())
    assert metrics.mutual_information(z, mu, logvar) == pytest.approx(expected, abs=1e-6)


class _LinearGaussian:
    """p(z) = N(0, I), p(x|z) = N(x; W z, s^2 I), diagonal W: marginal and posterior are known exactly."""

    def __init__(self, width=3, noise=0.7):
        self.weight = torch.linspace(0.5, 1.5, width, dtype=torch.float64)
        self.variance = noise**2
        self.x = torch.randn(11, width, dtype=torch.float64) * 1.3

    def score(self, z):
        spread = torch.full_like(self.x, math.log(self.variance))
        return -metrics.gaussian_log_density(self.x, z * self.weight, spread)

    def log_marginal(self):
        covariance = torch.diag(self.weight**2 + self.variance)
        return MultivariateNormal(torch.zeros(len(self.weight), dtype=torch.float64), covariance).log_prob(self.x)

    def posterior(self):
        precision = 1.0 + self.weight**2 / self.variance
        mu = self.x * self.weight / self.variance / precision
        return mu, -torch.log(precision).expand_as(mu)


def test_importance_weights_of_the_exact_posterior_give_the_exact_marginal():
    toy = _LinearGaussian()
    mu, logvar = toy.posterior()
    noise = torch.randn(5, *mu.shape, dtype=torch.float64)
    found = metrics.importance_weighted_log_likelihood(toy.score, mu, logvar, noise)
    torch.testing.assert_close(found, toy.log_marginal(), rtol=1e-12, atol=1e-12)
    tokens = torch.arange(1, 12)
    exact = math.exp(-float(toy.log_marginal().sum()) / 66)
    assert metrics.perplexity(found, tokens) == pytest.approx(exact, rel=1e-12)


def test_importance_weights_of_a_wrong_posterior_approach_the_marginal_from_below():
    toy = _LinearGaussian()
    mu, logvar = toy.posterior()
    mu, logvar = mu + 0.3, logvar + 0.5
    exact = float(toy.log_marginal().mean())

    def bound(samples):
        noise = torch.randn(samples, *mu.shape, dtype=torch.float64)
        return float(metrics.importance_weighted_log_likelihood(toy.score, mu, logvar, noise).mean())

    one, many = sum(bound(1) for _ in range(200)) / 200, bound(4000)
    assert one < exact - 0.1  # the ELBO's gap is KL(q || p(z|x)) = 0.4 here
    assert many == pytest.approx(exact, abs=0.02)


def test_importance_weighting_equals_its_formula_term_by_term():
    z, mu, logvar = _posteriors(4, 3)
    noise = torch.randn(6, 4, 3, dtype=torch.float64)
    score = lambda z: (z**2).sum(-1) + 1.0  # noqa: E731
    rows = []
    for eps in noise:
        z = mu + eps * torch.exp(0.5 * logvar)
        prior = metrics.gaussian_log_density(z, torch.zeros_like(z), torch.zeros_like(z))
        rows.append(-score(z) + prior - metrics.gaussian_log_density(z, mu, logvar))
    expected = torch.logsumexp(torch.stack(rows), 0) - math.log(6)
    torch.testing.assert_close(metrics.importance_weighted_log_likelihood(score, mu, logvar, noise), expected)


def test_importance_weights_do_not_underflow():
    mu = torch.zeros(2, 1)
    found = metrics.importance_weighted_log_likelihood(lambda z: torch.full((2,), 5000.0), mu, mu, torch.zeros(3, 2, 1))
    torch.testing.assert_close(found, torch.full((2,), -5000.0, dtype=torch.float64))


def test_shapes_are_checked():
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[3\]"):
        metrics.kl_divergence(good, torch.zeros(3))
    with pytest.raises(ValueError, match="z must be"):
        metrics.mutual_information(torch.zeros(3, 3), good, good)
    with pytest.raises(ValueError, match="z must be"):
        metrics.total_correlation(torch.zeros(0, 3), good[:0], good[:0])
    with pytest.raises(ValueError, match="z must be"):
        metrics.dimension_wise_kl(torch.zeros(3, 3), good, good)
    with pytest.raises(ValueError, match="at least one draw"):
        metrics.importance_weighted_log_likelihood(lambda z: z.sum(-1), good, good, [])
    with pytest.raises(ValueError, match="at least one token"):
        metrics.perplexity(torch.zeros(2), torch.zeros(2, dtype=torch.int64))
