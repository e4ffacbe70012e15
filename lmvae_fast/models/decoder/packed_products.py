"""Linear modules of a frozen decoder as products over packed weights, in the dtype they are held in or in int8."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

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
from lmvae_fast.models.decoder.linear_weights import linear_weight, plain_linears, require
from lmvae_fast.models.decoder.low_rank import effective_weight, is_adapted, without_adapter


class Packing:
    """Packs modules into large pages that they share; low-rank adapters beside them are added to their weights.

    Args:
        weights: None for weights as they are held, or "int8".
    """

    def __init__(self, weights: str | None = None) -> None:
        self.weights, self._pages = weights, LargePages()

    def linear(self, *parts: nn.Module, activation: str = "none") -> PackedLinear:
        """One linear module, or several with the same inputs, whose outputs then lie side by side."""
        weight = torch.cat([self._weight(part) for part in parts])
        biases = [part.bias for part in map(without_adapter, parts) if isinstance(part.bias, Tensor)]
        require(len(biases) in (0, len(parts)), "a bias in some of the projections of one input")
        bias = torch.cat([b.detach() for b in biases]) if biases else None
        packed = self._quantized(quantize_weight(weight)) if self.weights else self._pages.copy(pack_weight(weight))
        options = {"out_features": weight.shape[0], "activation": activation, "dtype": weight.dtype}
        return PackedLinear(packed, bias, **options)

    def gated(self, gate: nn.Linear, up: nn.Linear) -> PackedLinear:
        """``silu(gate(x)) * up(x)``."""
        both = self._weight(gate), self._weight(up)
        require(gate.bias is None and up.bias is None, "a bias in a gated layer")
        packed = self._quantized(quantize_gated(*both)) if self.weights else self._pages.copy(pack_gated(*both))
        return PackedLinear(packed, out_features=both[0].shape[0], activation="swiglu", dtype=both[0].dtype)

    def _weight(self, part: nn.Module) -> Tensor:
        require(self.weights is None or not is_adapted(part), "adapters beside rounded weights")
        return effective_weight(part)

    def _quantized(self, weight: QuantizedWeight) -> QuantizedWeight:
        return QuantizedWeight(*(self._pages.copy(part) for part in (weight.values, weight.scales, weight.totals)))


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
