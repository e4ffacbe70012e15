"""The layers that training has (training_layers.py), of fewer kernels still for a decoding step of a few rows on CUDA.

A step of one row is a chain of small kernels, each of which waits for the one before: their number is most of its time. Here
the norms, activations and sums around a product belong to it (kernels/row_product), and a product's weights are on their way
before what it multiplies is there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lmvae_fast.kernels import frozen_layer
from lmvae_fast.kernels.row_product import MOST_ROWS, WAY, row_product
from lmvae_fast.kernels.row_product import Norm as RowNorm
from lmvae_fast.models.decoder.attention import AttentionContext
from lmvae_fast.models.decoder.cache import LatentCache
from lmvae_fast.models.decoder.frozen_products import FrozenLinear
from lmvae_fast.models.decoder.linear_weights import Unlike
from lmvae_fast.models.decoder.low_rank import merged
from lmvae_fast.models.decoder.training_layers import (
    Attend,
    IntoAttention,
    LastNorm,
    Layers,
    Norm,
    OutOfAttention,
    Turns,
)

logger = logging.getLogger(__name__)


class _Product(NamedTuple):
    """A frozen product whose weight's rows lie in one piece each, which of GPT-2's is a copy."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, norm: Norm | None = None, **options: object) -> Tensor:
        given = None if norm is None else RowNorm(norm.weight, norm.bias, norm.eps, norm.bias is not None)
        # Weights were written long before a step, which begins with kernels of torch's that wait for all before them.
        return row_product(x, self.weight, self.bias, norm=given, settled=True, **options)


class _Layer(NamedTuple):
    into: IntoAttention
    attend: Attend
    out: OutOfAttention
    products: tuple[_Product, ...]  # into attention, out of it, up, down

    def run(self, x: Tensor, context: LatentCache, turns: Turns | None) -> Tensor:
        """Hidden states ``[T, hidden]`` after the layer."""
        qkv, out, up, down = self.products
        heard = qkv(x, self.into.norm)
        for norm in self.into.of_heads:
            norm(heard)
        if turns is not None:
            frozen_layer.rotate_(heard, *turns, heads=self.into.turned)
        middle = out(self.attend(context, heard), added=x)
        return down(up(middle, self.out.norm, activation=self.out.activation), added=middle)


class RowLayers:
    """`Layers`, whose steps of up to `MOST_ROWS` rows over a cache have few kernels, adapters added to copies of fp32 weights.
    Norms behind products (Gemma 2 and 3), and adapters beside half weights, keep them as they are."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.few: list[_Layer] | None = None
        parts = [cast(OutOfAttention, segment.before) for segment in layers.segments[1:]]
        into = [cast(IntoAttention, segment.after) for segment in layers.segments[:-1]]
        if WAY == "off" or any(norm is not None for part in parts for norm in part.behind):
            return
        try:
            self.few = [
                _Layer(first, attend, second, tuple(map(_prepared, _linears(first, second))))
                for first, attend, second in zip(into, layers.attend, parts, strict=True)
            ]
        except (Unlike, torch.OutOfMemoryError) as reason:
            logger.info("steps of few rows have the kernels of any: %s", reason)

    def run(self, x: Tensor, context: AttentionContext, turns: Sequence[Turns | None]) -> Tensor:
        """As `Layers.run`."""
        few = self.few is not None and x.shape[0] <= MOST_ROWS and not torch.is_grad_enabled()
        if not few or not isinstance(context, LatentCache):
            return self.layers.run(x, context, turns)
        for layer, turned in zip(cast(list[_Layer], self.few), turns, strict=True):
            x = layer.run(x, context, turned)
        return cast(LastNorm, self.layers.segments[-1].after).norm(x)[0]


def _linears(into: IntoAttention, out: OutOfAttention) -> tuple[FrozenLinear, ...]:
    return into.qkv, out.out, out.up, out.down


def _prepared(linear: FrozenLinear) -> _Product:
    weight = merged(linear.weight, linear.adapters)
    return _Product(weight if weight.stride(1) == 1 else weight.contiguous(), linear.bias)
