"""Argument checks of row_product: every bad input is named, with both sizes, before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..frozen_layer.checks import check_rows, check_vector
from ..frozen_layer.reference import ACTIVATIONS, GATED
from .reference import Norm


def check_product(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, activation: str | None) -> None:
    """Raise ValueError or TypeError unless rows, weight, norm and activation go together."""
    check_rows("x", x)
    check_rows("weight", weight, x)
    if weight.shape[1] != x.shape[1] or 0 in weight.shape:
        raise ValueError(f"x is {list(x.shape)} and weight {list(weight.shape)}: they must end alike, and have columns")
    if bias is not None:
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias is {list(bias.shape)}, it must be [{weight.shape[0]}]")
        if bias.dtype not in (x.dtype, torch.float32) or bias.device != x.device:
            raise TypeError(f"bias is {bias.dtype} on {bias.device}, x {x.dtype} on {x.device}")
    if norm is not None:
        check_vector("norm.weight", norm.weight, x)
        if norm.bias is not None:
            check_vector("norm.bias", norm.bias, x)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if activation in GATED and weight.shape[0] % 2:
        raise ValueError(
            f"weight is {list(weight.shape)}: {activation} needs an even number of rows, gates and what passes"
        )
