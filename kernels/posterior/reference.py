"""posterior_sample in plain torch: the truth that every backend is held to."""

from __future__ import annotations

import torch

from .. import philox


def kl_terms(mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mu, e^logvar) || N(0, 1)) of each dimension, in nats (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mu * mu + logvar.exp() - logvar - 1.0)


def kl_divergence(mu: torch.Tensor, logvar: torch.Tensor, kl: str, kl_target: float) -> torch.Tensor:
    """[B, D] -> [B]. Masks multiply, so that an Inf or NaN stays visible; free bits pass their gradient at the target."""
    terms = kl_terms(mu, logvar)
    if kl == "dim_threshold":
        return (terms * (terms > kl_target)).sum(-1)
    if kl == "free_bits":
        return terms.clamp(min=kl_target).sum(-1)
    total = terms.sum(-1)
    return total * (total > kl_target) if kl == "sample_threshold" else total


def posterior_sample(
    mu: torch.Tensor, logvar: torch.Tensor, seed: torch.Tensor, num_samples: int, kl: str, kl_target: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, D] twice -> z [B, D] (or [num_samples, B, D]) in mu's dtype and kl [B] in fp32 (fp64 for fp64). seed: [2]."""
    dtype = torch.promote_types(mu.dtype, torch.float32)
    shape = mu.shape if num_samples == 1 else (num_samples, *mu.shape)
    m, lv = mu.to(dtype), logvar.to(dtype)
    z = m + torch.exp(0.5 * lv) * philox.normal(seed, shape, dtype)
    return z.to(mu.dtype), kl_divergence(m, lv, kl, kl_target)
