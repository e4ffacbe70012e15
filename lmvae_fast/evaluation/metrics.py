"""Figures of a latent-variable model as pure functions of tensors; nats throughout, accumulated in float64.

N sentences, D latent dimensions. Nothing here knows a model. Sources: active units, Burda et al. 2016
(arXiv 1509.00519), section 5.2; mutual information, Hoffman & Johnson 2016 as estimated by He et al. 2019 (arXiv
1901.05534); total correlation and dimension-wise KL, Chen et al. 2018 (arXiv 1802.04942); importance-weighted
likelihood, Burda et al. 2016, as Optimus (arXiv 2004.04092) uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmvae_fast.models import aggregate
from lmvae_fast.models.objective import kl_per_dim

#: Variance of the posterior mean, over the data, from which a dimension counts as active.
ACTIVE_UNIT_VARIANCE = 0.01


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, diag(exp(logvar))) || N(0, I)) of each row: ``[N, D], [N, D] -> [N]`` float64, without any threshold."""
    _check_pair(mu, logvar)
    return kl_per_dim(mu.double(), logvar.double()).sum(-1)


def gaussian_log_density(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; mu, diag(exp(logvar))), summed over the last axis; the leading axes broadcast. float64."""
    return aggregate.gaussian_logpdf(z.double(), mu.double(), logvar.double()).sum(-1)


def active_units(mu: Tensor, threshold: float = ACTIVE_UNIT_VARIANCE) -> int:
    """Number of dimensions whose posterior mean varies over the data: #{d: Var_x(mu_d) >= threshold}.

    Args:
        mu: posterior means ``[N, D]``, N >= 2 (the unbiased variance needs two).
    """
    if mu.dim() != 2 or mu.shape[0] < 2:
        raise ValueError(f"active_units needs mu [N >= 2, D], got {list(mu.shape)}")
    return int((mu.double().var(dim=0) >= threshold).sum())


@torch.no_grad()
def mutual_information(z: Tensor, mu: Tensor, logvar: Tensor) -> float:
    """I(x; z) under q, estimated against the aggregate posterior of these N sentences; between about 0 and log N.

    mean_i [ log q(z_i|x_i) - (logsumexp_j log q(z_i|x_j) - log N) ]. Both terms are taken at the same samples: that has
    the expectation of the form with the posteriors' closed entropy and less variance, and is never above log N.

    Args:
        z: one sample of each posterior ``[N, D]``.
        mu, logvar: the posteriors ``[N, D]``.
    """
    _check_samples(z, mu, logvar)
    return float(aggregate.mutual_information(z.double(), mu.double(), logvar.double()).mean())


@torch.no_grad()
def total_correlation(z: Tensor, mu: Tensor, logvar: Tensor) -> float:
    """KL(q(z) || prod_d q(z_d)) of the aggregate posterior of these N sentences, estimated at their samples.

    mean_i [ log q(z_i) - sum_d log q(z_id) ], both against all N posteriors. Arguments as for `mutual_information`.
    """
    _check_samples(z, mu, logvar)
    return float(aggregate.decompose_kl(z.double(), mu.double(), logvar.double()).total_correlation.mean())


@torch.no_grad()
def dimension_wise_kl(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(z_d) || N(0, 1)) of every dimension's aggregate: ``[D]`` float64, estimated at the samples.

    Arguments as for `mutual_information`. With it and the total correlation it adds up to the mean KL of the posteriors
    (Chen et al. 2018).
    """
    _check_samples(z, mu, logvar)
    return aggregate.aggregate_kl_per_dim(z.double(), mu.double(), logvar.double()).mean(0)


def importance_weighted_log_likelihood(
    score: Callable[[Tensor], Tensor], mu: Tensor, logvar: Tensor, noise: Sequence[Tensor] | Tensor
) -> Tensor:
    """log p(x) of each sentence from below: logsumexp_k [log p(x|z_k) + log p(z_k) - log q(z_k|x)] - log K.

    Args:
        score: ``[N, D] -> [N]``, the negative log-likelihood -log p(x|z) of each sentence under its own z.
        mu, logvar: the posteriors ``[N, D]``; z_k = mu + noise_k exp(logvar / 2).
        noise: K draws of N(0, I), each ``[N, D]``. ``score`` sees one at a time.

    Returns:
        ``[N]`` float64. K = 1 gives a one-sample ELBO; the bound tightens as K grows.
    """
    _check_pair(mu, logvar)
    num_samples = len(noise)
    if num_samples == 0:
        raise ValueError("importance_weighted_log_likelihood needs at least one draw of noise, got 0")
    wide_mu, wide_logvar = mu.double(), logvar.double()
    total: Tensor | None = None
    for eps in noise:
        eps = eps.to(wide_mu)
        z = wide_mu + eps * torch.exp(0.5 * wide_logvar)
        # log p(z) - log q(z|x); the constants cancel, and (z - mu)/sigma is eps.
        log_ratio = 0.5 * (eps.square() + wide_logvar - z.square()).sum(-1)
        log_weight = log_ratio - score(z.to(mu.dtype)).double()
        total = log_weight if total is None else torch.logaddexp(total, log_weight)
    assert total is not None
    return total - math.log(num_samples)


def perplexity(log_likelihood: Tensor, tokens: Tensor) -> float:
    """exp(-sum log p / sum tokens) over sentences: ``[N]`` nats and ``[N]`` counts. Infinite where exp overflows."""
    if log_likelihood.shape != tokens.shape:
        raise ValueError(f"log_likelihood {list(log_likelihood.shape)} and tokens {list(tokens.shape)} must agree")
    count = int(tokens.sum())
    if count < 1:
        raise ValueError(f"perplexity needs at least one token, got {count}")
    return float(torch.exp(-log_likelihood.double().sum() / count))


def _check_samples(z: Tensor, mu: Tensor, logvar: Tensor) -> None:
    _check_pair(mu, logvar)
    if z.shape != mu.shape or z.shape[0] == 0:
        raise ValueError(f"z must be [N >= 1, D] like mu {list(mu.shape)}, got {list(z.shape)}")


def _check_pair(mu: Tensor, logvar: Tensor) -> None:
    if mu.dim() != 2 or mu.shape != logvar.shape:
        raise ValueError(f"mu and logvar must both be [N, D], got {list(mu.shape)} and {list(logvar.shape)}")
