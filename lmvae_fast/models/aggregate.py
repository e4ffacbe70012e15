"""What a group's aggregate posterior says about its posteriors: DG-KL, mutual information, total correlation.

The aggregate of a group of N posteriors q(z|x_n) is their mean, q(z) = 1/N sum_n q(z|x_n): joint, or one per dimension.
All figures are estimated at samples z of the posteriors, reparameterised or not; nothing is detached, so each of them can be
a penalty. Each posterior gets its own share, `[N]`: the group's figure is their mean over the group, and the batch's mean
that of `objective.combine`. Memory is that of the samples: see `kernels.aggregate_logpdf`.

Sources: DG-KL and marginal mutual information, Zhang et al. 2022 (DG-VAE) and CVAE with G-Skip; mutual information, Hoffman &
Johnson 2016; the decomposition, Chen et al. 2018 (arXiv 1802.04942, section 3).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lmvae_fast.kernels.aggregate_logpdf import aggregate_logpdf

#: The constant in every density of the public code of CVAE with G-Skip, the prior's too: it guards half precision there.
CVAE_MIN_VAR = 1e-4

_LOG_2PI = math.log(2.0 * math.pi)


class KlParts(NamedTuple):
    """What `decompose_kl` returns, each `[N]` in nats; their sum is KL(q(z|x_n) || N(0, I)), estimated at the samples.

    mutual_information: ln q(z|x_n) - ln q(z). total_correlation: ln q(z) - sum_d ln q(z_d). dimension_wise_kl:
    sum_d [ln q(z_d) - ln p(z_d)], which is `dg_kl`.
    """

    mutual_information: Tensor
    total_correlation: Tensor
    dimension_wise_kl: Tensor


def gaussian_logpdf(z: Tensor, mu: Tensor, logvar: Tensor, min_var: float = 0.0) -> Tensor:
    """-ln(2 pi) / 2 - logvar / 2 - (z - mu)^2 / (2 e^logvar + min_var), element by element, in fp32 (fp64 for fp64).

    Shapes broadcast. min_var: `CVAE_MIN_VAR` for the density of the public code.
    """
    dtype = torch.promote_types(mu.dtype, torch.float32)
    z, mu, logvar = z.to(dtype), mu.to(dtype), logvar.to(dtype)
    return -0.5 * (_LOG_2PI + logvar) - (z - mu).square() / (2.0 * logvar.exp() + min_var)


def _prior_logpdf(z: Tensor, min_var: float) -> Tensor:
    """The same of N(0, 1)."""
    return -0.5 * _LOG_2PI - z.to(torch.promote_types(z.dtype, torch.float32)).square() / (2.0 + min_var)


def _over_samples(x: Tensor, rank: int) -> Tensor:
    """The mean over the samples in front of the last `rank` dimensions, if there are any."""
    return x.flatten(0, -rank - 1).mean(0) if x.dim() > rank else x


def aggregate_kl_per_dim(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    groups: Tensor | None = None,
    cu_posteriors: Tensor | None = None,
    min_var: float = 0.0,
) -> Tensor:
    """KL(q(z_d) || N(0, 1)) of the aggregate of every dimension, in the share of each posterior.

    Args:
        z: samples of the posteriors, [..., N, D].
        mu, logvar: the posteriors, [N, D], in z's dtype.
        groups, cu_posteriors: ids [N] or offsets int32 [G + 1] of the groups (`aggregate_logpdf`); without them one group.
        min_var: in every density, the prior's too; `CVAE_MIN_VAR` for parity with the public code.

    Returns:
        [N, D] in nats, fp32 (fp64 for fp64): the mean over the samples of ln q(z_nd) - ln p(z_nd). The mean over a group is
        its figure, from which collapsed units are counted.
    """
    aggregate = aggregate_logpdf(
        z, mu, logvar, per_dim=True, groups=groups, cu_posteriors=cu_posteriors, min_var=min_var
    )
    return _over_samples(aggregate - _prior_logpdf(z, min_var), 2)


def dg_kl(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    groups: Tensor | None = None,
    cu_posteriors: Tensor | None = None,
    min_var: float = 0.0,
) -> Tensor:
    """The penalty of DG-VAE and CVAE with G-Skip: `aggregate_kl_per_dim` summed over the dimensions, [N] in nats.

    Its mean over a group of N posteriors with M samples each is 1/(N M) sum_k sum_d [logsumexp_n lp(z_kd; mu_nd, lv_nd)
    - ln N - lp(z_kd; 0, 0)]. In a group of one it is the plain KL of that posterior, estimated at its samples.
    """
    return aggregate_kl_per_dim(z, mu, logvar, groups=groups, cu_posteriors=cu_posteriors, min_var=min_var).sum(-1)


def mutual_information(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    per_dim: bool = False,
    groups: Tensor | None = None,
    cu_posteriors: Tensor | None = None,
    min_var: float = 0.0,
) -> Tensor:
    """I(x; z) within a group, [N] in nats: the mean over the samples of ln q(z|x_n) - ln q(z); at most ln N.

    per_dim: the marginal mutual information, sum_d [ln q(z_d|x_n) - ln q(z_d)]. Other arguments as for
    `aggregate_kl_per_dim`.
    """
    own = gaussian_logpdf(z, mu, logvar, min_var)
    aggregate = aggregate_logpdf(
        z, mu, logvar, per_dim=per_dim, groups=groups, cu_posteriors=cu_posteriors, min_var=min_var
    )
    return _over_samples((own - aggregate).sum(-1) if per_dim else own.sum(-1) - aggregate, 1)


def decompose_kl(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    groups: Tensor | None = None,
    cu_posteriors: Tensor | None = None,
    min_var: float = 0.0,
) -> KlParts:
    """The KL to the prior as mutual information, total correlation and dimension-wise KL, each [N] in nats.

    Arguments as for `aggregate_kl_per_dim`. With small groups the aggregates are estimates: total correlation is then biased
    by the group's size (Chen et al. 2018, appendix C), and may be negative for a single posterior's share.
    """
    options = {"groups": groups, "cu_posteriors": cu_posteriors, "min_var": min_var}
    own = gaussian_logpdf(z, mu, logvar, min_var).sum(-1)
    joint = aggregate_logpdf(z, mu, logvar, per_dim=False, **options)
    marginal = aggregate_logpdf(z, mu, logvar, per_dim=True, **options).sum(-1)
    prior = _prior_logpdf(z, min_var).sum(-1)
    return KlParts(*(_over_samples(x, 1) for x in (own - joint, joint - marginal, marginal - prior)))
