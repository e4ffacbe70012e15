"""Attention sinks: a score of each head's own in the softmax's sum, which takes weight away and gives nothing (gpt-oss).

With L the logarithm of a row's sum of exponentials and s the head's sink, every weight shrinks by w = sigmoid(L - s). The
kernels' two numbers a row are (m, 1 / sum of exp(score - m)), so L = m - log of the second, and the backward kernel, given the
shrunken output and second number, computes the gradients of the shrunken softmax as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registration import primitives


class _WithSinks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, choice: str, sinks: Tensor, options: tuple, q: Tensor, k: Tensor, v: Tensor,
                memory_k: Tensor | None, memory_v: Tensor | None, cu_seqlens: Tensor) -> Tensor:  # fmt: skip
        run = primitives(choice, q)
        out, stats = run.latent_attention_fwd(q, k, v, memory_k, memory_v, cu_seqlens, *options)
        largest, factor = stats.unbind(-1)
        kept = torch.sigmoid(largest - factor.log() - sinks.to(stats.dtype))
        out = (out * kept.unsqueeze(-1)).to(q.dtype)
        ctx.run, ctx.options, ctx.sink_dtype = run, options, sinks.dtype
        stats = torch.stack([largest, factor * kept], dim=-1)
        ctx.save_for_backward(q, k, v, memory_k, memory_v, cu_seqlens, out, stats, kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple:  # type: ignore[override]
        q, k, v, memory_k, memory_v, cu_seqlens, out, stats, kept = ctx.saved_tensors
        grad_q, grad_kv, grad_memory = ctx.run.latent_attention_bwd(
            grad_out, q, k, v, memory_k, memory_v, out, stats, cu_seqlens, *ctx.options
        )
        grad_k, grad_v = grad_kv.unbind()
        memory = (None, None) if memory_k is None else grad_memory.unbind()
        seen = (grad_out.to(kept.dtype) * out.to(kept.dtype)).sum(-1)
        sinks = (-(1 - kept) * seen).sum(0).to(ctx.sink_dtype)
        return None, sinks, None, grad_q, grad_k, grad_v, *memory, None


def latent_attention_with_sinks(
    choice: str, sinks: Tensor, options: tuple, q: Tensor, k: Tensor, v: Tensor,
    memory_k: Tensor | None, memory_v: Tensor | None, cu_seqlens: Tensor,
) -> Tensor:  # fmt: skip
    """`latent_attention` by a compiled backend, under ``sinks [H]``; ``options`` are those of the primitive."""
    return _WithSinks.apply(choice, sinks, options, q, k, v, memory_k, memory_v, cu_seqlens)
