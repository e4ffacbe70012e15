"""Argument checks of posterior_sample: every bad input is named before any kernel runs."""

from __future__ import annotations

import math

from torch import Tensor

from .modes import KL_MODES


def check_posterior_sample(mu: Tensor, logvar: Tensor, num_samples: int, kl: str, kl_target: float) -> None:
    """Raise TypeError for wrong dtypes, ValueError for wrong shapes, devices, names or numbers."""
    if mu.shape != logvar.shape:
        raise ValueError(f"mu is {list(mu.shape)} and logvar {list(logvar.shape)}: they must have one shape")
    if mu.dim() < 1 or mu.shape[-1] < 1:
        raise ValueError(f"mu is {list(mu.shape)}: it needs a last dimension of at least 1")
    if mu.dtype != logvar.dtype or not mu.is_floating_point():
        raise TypeError(f"mu is {mu.dtype} and logvar {logvar.dtype}: they must have one floating dtype")
    if mu.device != logvar.device:
        raise ValueError(f"mu is on {mu.device} and logvar on {logvar.device}")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    if kl not in KL_MODES:
        raise ValueError(f"kl={kl!r} is not one of {', '.join(KL_MODES)}")
    if not 0.0 <= kl_target < math.inf:  # not math.isfinite: a graph may hold the number as a symbol
        raise ValueError(f"kl_target={kl_target} must be finite and not negative: a divergence is")
