"""Argument checks of packed_linear: every bad input is named, with both sizes, before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import ACTIVATIONS, BYTE_STEP, PANEL, STEP


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
    paired = packed.dtype == torch.bfloat16
    _check_panels(x, packed, [-1, 2, 16, 16, 2] if paired else [x.shape[-1] if x.dim() else 0, PANEL], STEP)
    _check_product(x, packed.shape[0], bias, residual, out_features, activation)
    _check_alike("packed_linear", x, {"packed": packed, "bias": bias, "residual": residual})


def check_quantized(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    totals: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation: str,
) -> None:
    """The same of packed_linear_int8."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise TypeError(f"x is {x.dtype}, it must be torch.float32 or torch.bfloat16")
    parts = {"values": (values, torch.int8), "scales": (scales, torch.float32), "totals": (totals, torch.int32)}
    for name, (part, dtype) in parts.items():
        if part.dtype != dtype or part.device != x.device:
            raise TypeError(f"{name} is {part.dtype} on {part.device}, it must be {dtype} on {x.device}")
    _check_panels(x, values, [-1, 2, 16, 16, 4], BYTE_STEP)
    for name in ("scales", "totals"):
        if list(parts[name][0].shape) != [values.shape[0], PANEL]:
            raise ValueError(f"{name} is {list(parts[name][0].shape)}, it must be {[values.shape[0], PANEL]}")
    _check_product(x, values.shape[0], bias, residual, out_features, activation)
    _check_alike("packed_linear_int8", x, {"bias": bias, "residual": residual})


def _check_panels(x: Tensor, packed: Tensor, inner: list[int], step: int) -> None:
    """``inner``: the shape of one panel; -1 for as many steps as hold K."""
    inputs = x.shape[-1] if x.dim() else 0
    expected = [-(-inputs // step) if size == -1 else size for size in inner]
    if x.dim() < 1 or packed.dim() < 1 or list(packed.shape[1:]) != expected:
        sizes = [f"ceil(K / {step})", *inner[1:]] if inner[0] == -1 else ["K", PANEL]
        shown = ", ".join(str(size) for size in ("panels", *sizes))
        raise ValueError(f"x is {list(x.shape)} and packed {list(packed.shape)}: they must be [..., K] and [{shown}]")


def _check_product(
    x: Tensor, panels: int, bias: Tensor | None, residual: Tensor | None, out_features: int, activation: str
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    gated = activation == "swiglu"
    width = PANEL // 2 if gated else PANEL
    if panels != -(-out_features // width):
        raise ValueError(f"out_features={out_features} does not fit the {panels} panels of {width} of packed")
    if bias is not None and (gated or list(bias.shape) != [out_features]):
        raise ValueError(f"bias is {list(bias.shape)}, it must be {'None with swiglu' if gated else [out_features]}")
    if residual is not None and list(residual.shape) != [*x.shape[:-1], out_features]:
        raise ValueError(f"residual is {list(residual.shape)}, it must be {[*x.shape[:-1], out_features]}")


def _check_alike(op: str, x: Tensor, others: dict[str, Tensor | None]) -> None:
    for name, other in others.items():
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise TypeError(f"{name} is {other.dtype} on {other.device}, x {x.dtype} on {x.device}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others.values())):
        raise ValueError(f"{op} has no gradient: x, {', '.join(others)} must not require one")
