"""aggregate_logpdf in plain torch: the truth that every backend is held to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_2PI = math.log(2.0 * math.pi)
_ELEMENTS = 2**24  # of one dense [rows, N, D] block: without gradients no more than that exists at a time


def group_of_rows(cu: Tensor, rows: int) -> Tensor:
    """The group of each of `rows` rows under offsets cu [G + 1]: int64 [rows]."""
    return torch.searchsorted(cu, torch.arange(rows, device=cu.device, dtype=cu.dtype), right=True) - 1


def _rows(z: Tensor, mu: Tensor, logvar: Tensor, same: Tensor | None, per_dim: bool, min_var: float) -> Tensor:
    """[..., K, D] under [N, D] twice; same [K, N, 1] says which posteriors a row's aggregate holds (None: all)."""
    distance, lv = z.unsqueeze(-2) - mu, logvar
    if same is not None:  # values of other groups must not reach gradients as 0 * Inf or 0 * NaN either
        distance, lv = torch.where(same, distance, 0.0), torch.where(same, logvar, 0.0)
    log_density = -0.5 * LOG_2PI - 0.5 * lv - distance * distance / (2.0 * lv.exp() + min_var)
    if not per_dim:
        log_density = log_density.sum(-1, keepdim=True)
    if same is None:
        aggregate = log_density.logsumexp(-2) - math.log(mu.shape[0])
    else:
        count = same.sum(1).to(mu.dtype)
        aggregate = log_density.masked_fill(~same, -math.inf).logsumexp(-2) - count.log()
    return aggregate if per_dim else aggregate.squeeze(-1)


def aggregate_logpdf(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    cu_z: Tensor | None,
    cu_posteriors: Tensor | None,
    per_dim: bool,
    min_var: float,
) -> Tensor:
    """z [S, K, D]; mu, logvar [N, D]; offsets [G + 1] or None -> [S, K, D] (per_dim) or [S, K], fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(mu.dtype, torch.float32)
    z, mu, logvar = z.to(dtype), mu.to(dtype), logvar.to(dtype)
    if z.numel() == 0:
        empty = z if per_dim else z.sum(-1)
        return empty + 0.0 * (mu.sum() + logvar.sum())  # differentiable, with gradients of zero
    owner = None
    if cu_z is not None and cu_posteriors is not None:
        owner = group_of_rows(cu_z, z.shape[1])
        own = group_of_rows(cu_posteriors, mu.shape[0])
    step = max(1, _ELEMENTS // max(1, z.shape[0] * mu.numel()))
    parts = []
    for start in range(0, z.shape[1], step):
        rows = slice(start, start + step)
        same = None if owner is None else (owner[rows, None] == own).unsqueeze(-1)
        parts.append(_rows(z[:, rows], mu, logvar, same, per_dim, min_var))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
