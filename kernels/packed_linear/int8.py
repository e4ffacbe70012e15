"""packed_linear with weights of 8 bits: per output a scale, symmetric, to the nearest. CPU, no gradient.

In fp32 the whole numbers are widened on the way and the arithmetic is fp32. In bf16, where the CPU has dot products of bytes,
a row's numbers become whole numbers of 16 bits, which loses far less than bf16 itself had lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backend
from ..registration import define, primitives, refuse_gradients, refuse_vmap
from . import reference
from .checks import check_gated, check_quantized, check_weight
from .reference import ACTIVATIONS


def _fake(x, weight, scales, totals, bias, residual, activation, out_features):
    return x.new_empty((x.shape[0], out_features))


define(
    "packed_linear_int8(Tensor x, Tensor weight, Tensor scales, Tensor totals, Tensor? bias, Tensor? residual, "
    "int activation, int out_features) -> Tensor",
    fake=_fake,
)
backend.register("packed_linear_int8", cpp=backend.Support((torch.float32, torch.bfloat16), ("packed_linear_int8",)))


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight of `quantize_weight` or `quantize_gated`.

    values: int8 ``[panels, ceil(K / 64), 2, 16, 16, 4]`` (`reference.group_depths`). scales: fp32 ``[panels, 32]``, what a
    whole number of each output counts. totals: int32 ``[panels, 32]``, the sum of each output's whole numbers.
    """

    values: Tensor
    scales: Tensor
    totals: Tensor


def quantize_weight(weight: Tensor) -> QuantizedWeight:
    """Weight ``[N, K]`` to the nearest of 255 values of each output, the largest of them its greatest magnitude.

    Raises ValueError or TypeError for anything but a finite floating matrix with rows and columns, at most 65,536 of them.
    """
    check_weight("weight", weight)
    return _quantized(reference.panels_of(weight.detach()))


def quantize_gated(gate: Tensor, up: Tensor) -> QuantizedWeight:
    """Weights ``[N, K]`` of a gated layer for ``activation="swiglu"``. Raises as `quantize_weight`, and ValueError for two
    different shapes."""
    check_gated(gate, up)
    return _quantized(reference.gated_panels_of(gate.detach(), up.detach()))


def _quantized(panels: Tensor) -> QuantizedWeight:
    if panels.shape[-1] > 65_536:
        raise ValueError(f"the weight has {panels.shape[-1]} inputs, int8 sums hold 65536")
    whole, scales = reference.round_to_int8(panels)
    if not bool(scales.isfinite().all()):
        raise ValueError("the weight holds Inf or NaN, which no whole number stands for")
    return QuantizedWeight(reference.group_depths(whole), scales, whole.sum(-1, dtype=torch.int32))


def packed_linear_int8(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    out_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(x @ W.T + bias) + residual`` for the weight W that whole numbers and scales stand for.

    Args:
        x: ``[..., K]`` fp32 or bf16, any strides. bias: ``[N]`` or None. residual: ``[..., N]`` or None; of x's dtype.
        weight: of `quantize_weight`, with "swiglu" of `quantize_gated`.
        out_features, activation: as for `packed_linear`.

    Returns:
        ``[..., N]`` in x's dtype; sums, bias, activation and residual are fp32, rounded once. Not differentiable.

    Raises as `packed_linear`.
    """
    refuse_vmap("packed_linear_int8", x, bias, residual)
    check_quantized(x, weight.values, weight.scales, weight.totals, bias, residual, out_features, activation)
    refuse_gradients("packed_linear_int8", x=x, bias=bias, residual=residual)
    rows, added = x.reshape(-1, x.shape[-1]), None if residual is None else residual.reshape(-1, out_features)
    choice = backend.choose("packed_linear_int8", x)
    if choice == "reference":
        y = reference.packed_linear_int8(rows, weight.values, weight.scales, bias, added, activation, out_features)
    else:
        parts = weight.values.contiguous(), weight.scales.contiguous(), weight.totals.contiguous()
        number = ACTIVATIONS.index(activation)
        y = primitives(choice, x).packed_linear_int8(rows, *parts, bias, added, number, out_features)
    return y.view(*x.shape[:-1], out_features)
