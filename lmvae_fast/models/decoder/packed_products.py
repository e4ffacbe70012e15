"""Linear modules of a frozen decoder as products over packed weights, in the dtype they are held in or in int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lmvae_fast.kernels.packed_linear import (
    PackedLinear,
    QuantizedWeight,
    pack_gated,
    pack_weight,
    quantize_gated,
    quantize_weight,
)
from lmvae_fast.models.decoder.exchange import Exchanges, Forward
from lmvae_fast.models.decoder.large_pages import LargePages

Linear = nn.Linear | Conv1D


class Unlike(ValueError):
    """A model that is not what is written out; the message says where."""


def require(holds: bool, what: str) -> None:
    """Raises Unlike with ``what`` unless it holds."""
    if not holds:
        raise Unlike(what)


class Packing:
    """Packs modules into large pages that they share.

    Args:
        weights: None for weights as they are held, or "int8".
    """

    def __init__(self, weights: str | None = None) -> None:
        self.weights, self._pages = weights, LargePages()

    def linear(self, *parts: nn.Module, activation: str = "none") -> PackedLinear:
        """One linear module, or several with the same inputs, whose outputs then lie side by side."""
        weight = torch.cat([linear_weight(part) for part in parts])
        biases = [part.bias for part in parts if isinstance(part.bias, Tensor)]
        require(len(biases) in (0, len(parts)), "a bias in some of the projections of one input")
        bias = torch.cat([b.detach() for b in biases]) if biases else None
        packed = self._quantized(quantize_weight(weight)) if self.weights else self._pages.copy(pack_weight(weight))
        options = {"out_features": weight.shape[0], "activation": activation, "dtype": weight.dtype}
        return PackedLinear(packed, bias, **options)

    def gated(self, gate: nn.Linear, up: nn.Linear) -> PackedLinear:
        """``silu(gate(x)) * up(x)``."""
        both = linear_weight(gate), linear_weight(up)
        require(gate.bias is None and up.bias is None, "a bias in a gated layer")
        packed = self._quantized(quantize_gated(*both)) if self.weights else self._pages.copy(pack_gated(*both))
        return PackedLinear(packed, out_features=both[0].shape[0], activation="swiglu", dtype=both[0].dtype)

    def _quantized(self, weight: QuantizedWeight) -> QuantizedWeight:
        return QuantizedWeight(*(self._pages.copy(part) for part in (weight.values, weight.scales, weight.totals)))


def linear_weight(module: nn.Module) -> Tensor:
    """Weight of an nn.Linear or Conv1D as ``[outputs, inputs]``; raises Unlike for a quantised one and for other modules."""
    require(isinstance(module, (nn.Linear, Conv1D)), f"{type(module).__name__} in place of a linear map")
    weight: Any = getattr(module, "weight", None)
    require(_plain(weight), f"{type(module).__name__} over a weight of kind {type(weight).__name__}")
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().t()


def plain_linears(model: nn.Module) -> list[Linear]:
    """Linear modules whose weight is a matrix of floating numbers, rather than what a quantiser puts in its place."""
    found = [module for module in model.modules() if isinstance(module, Linear) and type(module) in (nn.Linear, Conv1D)]
    return [module for module in found if _plain(module.weight)]


def _plain(weight: Any) -> bool:
    # torchao's weights are tensors of a kind of their own that say they are float32.
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()


def rounded(model: nn.Module, weights: str | None) -> Exchanges:
    """What makes a model compute, module by module, with the weights that ``weights`` stands for: nothing for None."""
    found = plain_linears(model) if weights else []
    return [(module, _rounded_forward(module)) for module in found]


def _rounded_forward(module: nn.Module) -> Forward:
    def forward(x: Tensor) -> Tensor:
        weight = linear_weight(module).float()
        scales = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        bias = module.bias
        assert bias is None or isinstance(bias, Tensor)
        return linear(x, ((weight / scales).round() * scales).to(x.dtype), bias)

    return forward
