"""Argument checks of packed_linear: every bad input is named, with both sizes, before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import ACTIVATIONS, PANEL


def check_weight(name: str, weight: Tensor) -> None:
    """Raise ValueError or TypeError for anything but a floating matrix with rows and columns."""
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{name} must be [N, K], neither of them 0, got {list(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"{name} is {weight.dtype}, it must be floating")


def check_gated(gate: Tensor, up: Tensor) -> None:
    """Raise as `check_weight` for either of a gated layer's weights, and ValueError for two that are not alike."""
    check_weight("gate", gate)
    check_weight("up", up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate is {gate.dtype} {list(gate.shape)}, up {up.dtype} {list(up.shape)}: they must be alike")


def check_packed_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, out_features: int, activation: str
) -> None:
    """Raise TypeError for wrong dtypes or devices, ValueError for wrong shapes or names, or where a gradient is wanted."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    gated = activation == "swiglu"
    if x.dim() < 1 or packed.dim() != 3 or packed.shape[1] != x.shape[-1] or packed.shape[2] != PANEL:
        have = f"x is {list(x.shape)} and packed {list(packed.shape)}"
        raise ValueError(f"{have}: they must be [..., K] and [panels, K, {PANEL}]")
    width = PANEL // 2 if gated else PANEL
    if packed.shape[0] != -(-out_features // width):
        raise ValueError(f"out_features={out_features} does not fit the {packed.shape[0]} panels of {width} of packed")
    if bias is not None and (gated or list(bias.shape) != [out_features]):
        raise ValueError(f"bias is {list(bias.shape)}, it must be {'None with swiglu' if gated else [out_features]}")
    if residual is not None and list(residual.shape) != [*x.shape[:-1], out_features]:
        raise ValueError(f"residual is {list(residual.shape)}, it must be {[*x.shape[:-1], out_features]}")
    others = {"packed": packed, "bias": bias, "residual": residual}
    for name, other in others.items():
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise TypeError(f"{name} is {other.dtype} on {other.device}, x {x.dtype} on {x.device}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others.values())):
        raise ValueError("packed_linear has no gradient: x, packed, bias and residual must not require one")
