"""All layers of a decoding step in one call on a CPU (csrc/cpu/decode_body.cpp), over the parts of layers written out.

At a few rows the calls between a layer's products take a good part of the time that the products do. The layers themselves,
as Python calls them, are in prepared_layers.py, which reads the same parts; prompts go through those, and so does a step that
this cannot take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmvae_fast.kernels.backend import current, extension
from lmvae_fast.kernels.frozen_layer.reference import ACTIVATIONS as ROW_ACTIVATIONS
from lmvae_fast.kernels.inplace import written
from lmvae_fast.kernels.packed_linear import PackedLinear, QuantizedWeight
from lmvae_fast.kernels.packed_linear.reference import ACTIVATIONS
from lmvae_fast.kernels.registration import refuse_gradients
from lmvae_fast.models.decoder.cache import LatentCache


class RowNorm(NamedTuple):
    """LayerNorm of rows, or RMSNorm (``centred`` false): weight and bias ``[hidden]``, epsilon."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """A decoder layer: norms, packed products, heads.

    qkv: one product for queries, keys and values ``[heads + 2 kv_heads, head_dim]``. up: what ``down`` reads, or rows
    ``[gate, up]`` where ``gate`` names the activation (frozen_layer's) that the product does not apply. query_norm, key_norm:
    of every head (Qwen 3, Gemma 3). behind_attention, behind_mlp: of what is added to the hidden states (Gemma 2 and 3).
    rotation: which of the body's rotations turns queries and keys; None for none.
    """

    before_attention: RowNorm
    before_mlp: RowNorm
    qkv: PackedLinear
    out: PackedLinear
    up: PackedLinear
    down: PackedLinear
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    rotation: int | None = None
    gate: str | None = None
    query_norm: RowNorm | None = None
    key_norm: RowNorm | None = None
    behind_attention: RowNorm | None = None
    behind_mlp: RowNorm | None = None


class DecodeBody:
    """The layers and the last norm as one call for one token a row.

    `takes` says whether it can run a step; `step` runs it. Values are those of the layers one by one, by the same kernels.
    """

    #: False while somebody times the parts of a step (`profiling/parts.py`): they lie between its layers' calls.
    in_use = True

    def __init__(self, layers: Sequence[LayerParts], last: RowNorm) -> None:
        self._body: Any = None
        kind = _kind()
        if kind is None:
            return
        self._body = kind(_norm(last))
        for parts in layers:
            optional = (parts.query_norm, parts.key_norm, parts.behind_attention, parts.behind_mlp)
            self._body.add_layer(
                [_norm(parts.before_attention), _norm(parts.before_mlp)],
                *(None if norm is None else _norm(norm) for norm in optional),
                [_linear(product) for product in (parts.qkv, parts.out, parts.up, parts.down)],
                [parts.heads, parts.kv_heads, parts.head_dim],
                parts.scale,
                parts.window,
                parts.softcap,
                parts.rotation,
                None if parts.gate is None else ROW_ACTIVATIONS.index(parts.gate),
            )

    def takes(self, x: Tensor, context: object) -> bool:
        """Whether this step can go through: rows ``[rows, hidden]`` of a cache on a CPU in its dtype, on the C++ kernels, and
        no dispatch mode is on."""
        return (
            self.in_use
            and self._body is not None
            and type(context) is LatentCache
            and x.device.type == "cpu"
            and x.dtype == context.kv.dtype
            and current() in ("auto", "cpp")
            and not torch._C._len_torch_dispatch_stack()  # whoever watches operations (counts FLOPs, records) sees them all
        )

    def step(self, x: Tensor, cache: LatentCache, turns: Sequence[Tensor]) -> Tensor:
        """Normed hidden states ``[rows, hidden]`` after all layers; keys and values of the rows' tokens go into the cache.

        turns: cosines and sines ``[rows, head_dim]`` of every rotation, side by side.

        Raises ValueError where x wants a gradient, RuntimeError for a cache of another model or one that was not prepared for
        these rows.
        """
        refuse_gradients("a decoding step", x=x)
        out = self._body.step(x, cache.kv, *cache.step_places, list(turns))
        written(cache.kv)
        return out


def _kind() -> Any:
    """The class of csrc; None where there is no extension, or one built without it."""
    if not extension()[0]:
        return None
    try:
        return torch.classes.lmvae_fast.DecodeBody
    except RuntimeError:
        return None


def _norm(norm: RowNorm) -> tuple[Tensor, Tensor | None, float, bool]:
    # The kernels' arithmetic is fp32: factors of half types are widened once, not at every step.
    bias = None if norm.bias is None else norm.bias.detach().float()
    return norm.weight.detach().float(), bias, float(norm.eps), norm.centred


def _linear(product: PackedLinear) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int, int]:
    packed, bias = product.packed, product.bias
    number = ACTIVATIONS.index(product.activation)
    if isinstance(packed, QuantizedWeight):
        return packed.values, packed.scales, packed.totals, bias, number, product.out_features
    return packed, None, None, bias, number, product.out_features
