"""A frozen decoder's layers in training as one call for each pass on a CPU (csrc/cpu/training_body.cpp).

The layers themselves, as Python calls them, are in training_layers.py: adapters go through those, and so does everything else
that this cannot take. Values and gradients are theirs, by the same kernels in the same order; only the gradient by what goes
in, a sum of two, is rounded once less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lmvae_fast.kernels.backend import current, extension
from lmvae_fast.kernels.frozen_layer.reference import ACTIVATIONS
from lmvae_fast.kernels.latent_attention.visibility import visibility_code
from lmvae_fast.kernels.packed_linear import PackedLinear
from lmvae_fast.kernels.registration import tangents
from lmvae_fast.models.decoder.attention import AttentionContext, PackedAttention
from lmvae_fast.models.decoder.frozen_products import FrozenLinear, OneDnnLinear
from lmvae_fast.models.decoder.training_layers import (
    Attend,
    IntoAttention,
    LastNorm,
    Layers,
    Norm,
    OutOfAttention,
    Turns,
)

_PLAIN = (Tensor, torch.nn.Parameter)


class TrainingCall:
    """`Layers`, whose passes over packed sentences are one node of autograd's each where the C++ kernels have them.

    Args:
        layers: the same, called one by one where this does not serve.
    """

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self._body = _body_of(layers)
        self._head_dim = _head_dim(cast(IntoAttention, layers.segments[0].after), layers.attend[0])

    def run(self, x: Tensor, context: AttentionContext, turns: Sequence[Turns | None]) -> Tensor:
        """As `Layers.run`, which also says what is wrong with arguments that do not fit."""
        if self._body is None or not self._serves(x, context):
            return self.layers.run(x, context, turns)
        packed = cast(PackedAttention, context)
        memory = packed.memory if packed.memory is not None and packed.memory.shape[4] else None
        around = (packed.cu_seqlens, visibility_code(packed.visibility), packed.max_seqlen)
        flat = [tensor for of_layer in turns if of_layer is not None for tensor in of_layer]
        keeps = torch.is_grad_enabled() and (x.requires_grad or (memory is not None and memory.requires_grad))
        return TrainingPass.apply(x, memory, self._body, around, flat, keeps)

    def _serves(self, x: Tensor, context: AttentionContext) -> bool:
        return (
            type(context) is PackedAttention
            and not context.position_columns
            and current() in ("auto", "cpp")
            and not torch._C._len_torch_dispatch_stack()  # whoever watches operations (counts FLOPs, records) sees them all
            and self._fits(x, context)
            and not tangents(x, context.memory)
        )

    def _fits(self, x: Tensor, context: PackedAttention) -> bool:
        """Whether these are tensors of a CPU, of no kind of their own (the layers' operations are theirs to change), of the
        shapes that the layers take."""
        memory, offsets = context.memory, context.cu_seqlens
        tensors = [x, offsets] if memory is None else [x, offsets, memory]
        first, attend = self.layers.segments[0].after, self.layers.attend
        heads = attend[0].kv_heads
        return (
            all(type(tensor) in _PLAIN and tensor.device.type == "cpu" for tensor in tensors)
            and x.shape[1:] == first.norm.weight.shape
            and offsets.dtype == torch.int32
            and offsets.dim() == 1
            and len(offsets) > 0
            and type(context.max_seqlen) is int
            and (
                memory is None
                or memory.shape == (len(attend), 2, len(offsets) - 1, heads, memory.shape[4], self._head_dim)
            )
        )


class TrainingPass(torch.autograd.Function):
    """All layers and the last norm as one function of hidden states ``[T, hidden]`` and memory
    ``[layers, 2, batch, kv_heads, slots, head_dim]``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, memory: Tensor | None, body: Any, around: tuple[Tensor, int, int], turns: list[Tensor],
        keeps: bool,
    ) -> Tensor:  # fmt: skip
        ctx.set_materialize_grads(False)
        own = None if memory is None else memory.to(x.dtype)
        out, *kept = body.forward(x, own, *around, turns, keeps)
        ctx.body, ctx.turned, ctx.around = body, len(turns), around[1:]
        ctx.memory_dtype = None if memory is None else memory.dtype
        ctx.save_for_backward(own, around[0], *turns, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        memory, cu_seqlens, *rest = ctx.saved_tensors
        turns, kept = rest[: ctx.turned], rest[ctx.turned :]
        by_x, by_memory = ctx.body.backward(grad, kept, memory, cu_seqlens, *ctx.around, turns, ctx.needs_input_grad[0])
        if not ctx.needs_input_grad[1]:
            by_memory = None
        return by_x, None if by_memory is None else by_memory.to(ctx.memory_dtype), None, None, None, None


def _body_of(layers: Layers) -> Any:
    """The layers as csrc has them; None where there is no extension, or something that it is not made of."""
    if not extension()[0]:
        return None
    try:
        kind = torch.classes.lmvae_fast.TrainingBody
    except RuntimeError:
        return None
    into = [cast(IntoAttention, segment.after) for segment in layers.segments[:-1]]
    out = [cast(OutOfAttention, segment.before) for segment in layers.segments[1:]]
    products = [_products(first, second) for first, second in zip(into, out, strict=True)]
    if any(of_layer is None for of_layer in products):
        return None
    body = kind(_norm(cast(LastNorm, layers.segments[-1].after).norm))
    for first, attend, second, of_layer in zip(into, layers.attend, out, products, strict=True):
        # Their columns say whose norms they are: queries' begin the row (at 0 or, in a slice, None).
        of_queries, of_keys = (
            next((norm.norm for norm in first.of_heads if (not norm.columns.start) == queries), None)
            for queries in (True, False)
        )
        body.add_layer(
            [_norm(first.norm), _norm(second.norm)],
            *(None if norm is None else _norm(norm) for norm in (of_queries, of_keys, *second.behind)),
            of_layer,
            [attend.heads, attend.kv_heads, _head_dim(first, attend)],
            ACTIVATIONS.index(second.activation),
            attend.scale,
            attend.window,
            attend.softcap,
        )
    return body


def _head_dim(into: IntoAttention, attend: Attend) -> int:
    return into.qkv.weight.shape[0] // (attend.heads + 2 * attend.kv_heads)


def _norm(norm: Norm) -> tuple[Tensor, Tensor | None, float, bool]:
    # The kernels' arithmetic is fp32: factors of half types are widened once, not at every step.
    bias = None if norm.bias is None else norm.bias.detach().float()
    return norm.weight.detach().float(), bias, float(norm.eps), norm.bias is not None


def _products(into: IntoAttention, out: OutOfAttention) -> list[tuple[Tensor, Tensor | None, int, bool]] | None:
    """A layer's products and, behind them, those of gradients; None for a layer with another kind or with adapters."""
    linears: list[FrozenLinear] = [into.qkv, out.out, out.up, out.down]
    if any(linear.adapters for linear in linears):
        return None
    found = []
    for product in [*(linear.forward for linear in linears), *(linear.backward for linear in linears)]:
        if isinstance(product, PackedLinear):
            found.append((cast(Tensor, product.packed), product.bias, product.out_features, False))
        elif isinstance(product, OneDnnLinear):
            found.append((product.weight, product.bias, 0, True))
        else:
            return None
    return found
