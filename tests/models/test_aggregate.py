"""DG-KL, mutual information and the decomposition against dense formulas in fp64, group by group."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lmvae_fast.models import aggregate
from lmvae_fast.models.objective import kl_per_dim

SIZES = [4, 1, 6]  # posteriors of each group; a group of one has no mutual information
CU = torch.tensor([0, *itertools.accumulate(SIZES)], dtype=torch.int32)
IDS = torch.repeat_interleave(torch.tensor([5, 2, 9]), torch.tensor(SIZES))


def posteriors(samples=7, dim=5, dtype=torch.float64):
    mu, logvar = torch.randn(sum(SIZES), dim, dtype=dtype), 0.6 * torch.randn(sum(SIZES), dim, dtype=dtype) - 0.7
    noise = torch.randn(samples, sum(SIZES), dim, dtype=dtype)
    return mu, logvar, noise


def sample(mu, logvar, noise):
    return mu + torch.exp(0.5 * logvar) * noise


def density(z, mu, logvar, min_var):
    return -0.5 * math.log(2 * math.pi) - 0.5 * logvar - (z - mu) ** 2 / (2 * torch.exp(logvar) + min_var)


def dense(z, mu, logvar, min_var):
    """The formulas, with every [samples, N, N, D] density: own, joint and marginal aggregate, prior; each [M, N(, D)]."""
    parts = []
    for a, b in itertools.pairwise(CU.tolist()):
        rows = z[:, a:b]
        pairs = density(rows[:, :, None], mu[a:b], logvar[a:b], min_var)
        joint = torch.logsumexp(pairs.sum(-1), 2) - math.log(b - a)
        marginal = torch.logsumexp(pairs, 2) - math.log(b - a)
        parts.append((density(rows, mu[a:b], logvar[a:b], min_var), joint, marginal))
    own, joint, marginal = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return own, joint, marginal, density(z, torch.zeros_like(z), torch.zeros_like(z), min_var)


def figures(function, mu, logvar, noise, **options):
    """Values and gradients in mu and logvar, the samples' included."""
    leaves = [x.clone().requires_grad_() for x in (mu, logvar)]
    found = function(sample(*leaves, noise), *leaves, **options)
    weights = torch.linspace(0.5, 1.5, found.numel(), dtype=found.dtype).view(found.shape)
    return found.detach(), *torch.autograd.grad((found * weights).sum(), leaves)


def same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("min_var", [0.0, aggregate.CVAE_MIN_VAR, 0.2])
@pytest.mark.parametrize("groups", [{"cu_posteriors": CU}, {"groups": IDS}], ids=["offsets", "ids"])
def test_every_figure_is_its_formula(min_var, groups):
    mu, logvar, noise = posteriors()

    def check(function, formula, **options):
        ours = figures(function, mu, logvar, noise, min_var=min_var, **groups, **options)
        same(ours, figures(lambda *x: formula(*dense(*x, min_var)), mu, logvar, noise))

    check(aggregate.aggregate_kl_per_dim, lambda own, joint, marginal, prior: (marginal - prior).mean(0))
    check(aggregate.dg_kl, lambda own, joint, marginal, prior: (marginal - prior).sum(-1).mean(0))
    check(aggregate.mutual_information, lambda own, joint, marginal, prior: (own.sum(-1) - joint).mean(0))
    check(
        aggregate.mutual_information,
        lambda own, joint, marginal, prior: (own - marginal).sum(-1).mean(0),
        per_dim=True,
    )
    parts = (
        lambda own, joint, marginal, prior: (own.sum(-1) - joint).mean(0),
        lambda own, joint, marginal, prior: (joint - marginal.sum(-1)).mean(0),
        lambda own, joint, marginal, prior: (marginal - prior).sum(-1).mean(0),
    )
    for place, formula in enumerate(parts):
        check(lambda *x, p=place, **options: aggregate.decompose_kl(*x, **options)[p], formula)


def test_dg_kl_of_one_prompt_is_the_published_sum():
    """1/(N M) sum over samples and dimensions, all responses of the prompt in the aggregate; one scalar."""
    mu, logvar, noise = (x[..., :4, :] for x in posteriors())
    z = sample(mu, logvar, noise)
    total = 0.0
    for k in z.reshape(-1, z.shape[-1]):
        for d in range(z.shape[-1]):
            aggregated = torch.logsumexp(density(k[d], mu[:, d], logvar[:, d], 1e-4), 0) - math.log(4)
            total += float(aggregated - density(k[d], torch.zeros(()), torch.zeros(()).double(), 1e-4))
    found = aggregate.dg_kl(z, mu, logvar, min_var=aggregate.CVAE_MIN_VAR).mean()
    assert float(found) == pytest.approx(total / (4 * noise.shape[0]), rel=1e-12)


def test_a_group_of_one_has_the_plain_kl_and_no_information():
    mu, logvar, noise = posteriors(samples=4000)
    z = sample(mu, logvar, noise)
    lone = CU[1]  # the posterior of the second group
    parts = aggregate.decompose_kl(z, mu, logvar, cu_posteriors=CU)
    assert float(parts.mutual_information[lone]) == pytest.approx(0.0, abs=1e-12)
    assert float(parts.total_correlation[lone]) == pytest.approx(0.0, abs=1e-12)
    exact = float(kl_per_dim(mu, logvar).sum(-1)[lone])
    assert float(parts.dimension_wise_kl[lone]) == pytest.approx(exact, abs=0.15)  # five standard errors are below 0.15


def test_the_parts_add_up_to_the_kl():
    mu, logvar, noise = posteriors(samples=4000)
    parts = aggregate.decompose_kl(sample(mu, logvar, noise), mu, logvar, cu_posteriors=CU)
    torch.testing.assert_close(sum(parts), kl_per_dim(mu, logvar).sum(-1), rtol=0, atol=0.2)
    assert (parts.mutual_information[: SIZES[0]] <= math.log(SIZES[0])).all()


def test_far_apart_posteriors_carry_the_group_in_full():
    """Each sample tells its own posterior: ln N, joint and in every dimension that separates."""
    mu = 100.0 * torch.arange(6, dtype=torch.float64)[:, None].repeat(1, 3)
    z = mu + torch.randn(4, 6, 3, dtype=torch.float64)
    joint = aggregate.mutual_information(z, mu, torch.zeros_like(mu))
    marginal = aggregate.mutual_information(z, mu, torch.zeros_like(mu), per_dim=True)
    torch.testing.assert_close(joint, torch.full_like(joint, math.log(6)))
    torch.testing.assert_close(marginal, torch.full_like(marginal, 3 * math.log(6)))
    parts = aggregate.decompose_kl(z, mu, torch.zeros_like(mu))
    torch.testing.assert_close(parts.total_correlation, torch.full_like(joint, 2 * math.log(6)))


@pytest.mark.parametrize("shape", [(11, 5), (1, 11, 5), (2, 3, 11, 5)])
def test_samples_may_have_any_leading_dimensions(shape):
    mu, logvar, _ = posteriors()
    z = sample(mu, logvar, torch.randn(shape, dtype=torch.float64))
    flat = z.reshape(-1, 11, 5)
    for function in (aggregate.dg_kl, aggregate.mutual_information, aggregate.aggregate_kl_per_dim):
        found = function(z, mu, logvar, cu_posteriors=CU)
        each = torch.stack([function(one, mu, logvar, cu_posteriors=CU) for one in flat])
        torch.testing.assert_close(found, each.mean(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_give_fp32(dtype):
    mu, logvar, noise = (x.to(dtype) for x in posteriors())
    z = sample(mu, logvar, noise)
    wide = [x.double() for x in (z, mu, logvar)]
    for name in ("dg_kl", "mutual_information", "aggregate_kl_per_dim"):
        found = getattr(aggregate, name)(z, mu, logvar, cu_posteriors=CU, min_var=1e-4)
        assert found.dtype == torch.float32
        expected = getattr(aggregate, name)(*wide, cu_posteriors=CU, min_var=1e-4)
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
