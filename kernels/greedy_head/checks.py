"""Argument checks of greedy_head: every bad input is named, with both sizes, before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor


def check_weight(weight: Tensor) -> None:
    """Raise ValueError or TypeError for anything but a fp32 matrix with rows and columns."""
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be [V, K], neither of them 0, got {list(weight.shape)}")
    if weight.dtype != torch.float32:
        raise TypeError(f"weight is {weight.dtype}, it must be torch.float32")


def check_hidden(hidden: Tensor, weight: Tensor) -> None:
    """Raise ValueError or TypeError unless hidden [..., K] goes with weight [V, K] and wants no gradient."""
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}: they must end alike")
    if hidden.dtype != torch.float32 or hidden.device != weight.device:
        raise TypeError(f"hidden is {hidden.dtype} on {hidden.device}, weight torch.float32 on {weight.device}")
    if torch.is_grad_enabled() and hidden.requires_grad:
        raise ValueError("greedy_head has no gradient: hidden must not require one")


def check_product(hidden: Tensor, weight: Tensor) -> None:
    """Raise ValueError or TypeError unless hidden [..., K] and weight [V, K] go together."""
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be [V, K], neither of them 0, got {list(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}: they must end alike")
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise TypeError(
            f"hidden is {hidden.dtype} on {hidden.device}, weight {weight.dtype} on {weight.device}: they must be one "
            "floating dtype on one device"
        )
