"""The layers of GPT-2 and of Llama's family written out for training on a CPU: forward, and backward to the inputs alone.

Between two attentions a frozen decoder has one function to autograd: out of a layer's attention, through its MLP, into the
queries, keys and values of the next. Its weights are prepared once for both passes (frozen_products.py), what stands between
the products is fused (kernels/frozen_layer), and it keeps what its gradient needs and nothing else: the rows that go into the
two norms, and what goes into the activation. Attention itself stays `latent_attention` with a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmvae_fast.kernels import frozen_layer
from lmvae_fast.models.decoder.attention import AttentionContext
from lmvae_fast.models.decoder.frozen_products import FrozenLinear
from lmvae_fast.models.decoder.large_pages import LargePages
from lmvae_fast.models.decoder.packed_products import linear_weight, require
from lmvae_fast.models.decoder.prepared_layers import LLAMAS, require_gpt2_layer, require_llama_layer

Saved = tuple[Tensor | None, ...]
Turns = tuple[Tensor, Tensor]  # cosines and sines [T, head_dim]


class Norm:
    """LayerNorm or RMSNorm of rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows, and what `gradient` needs of them."""
        return frozen_layer.norm(x, self.weight, self.bias, eps=self.eps, centred=self.bias is not None)

    def gradient(self, grad: Tensor, x: Tensor, stats: Tensor, added: Tensor | None) -> Tensor:
        """By x, plus ``added``."""
        centred = self.bias is not None
        return frozen_layer.norm_gradient(grad, x, stats, self.weight, centred=centred, added=added)


class IntoAttention:
    """Hidden states to queries, keys and values side by side, the first ``turned`` heads of them at their positions."""

    def __init__(self, norm: Norm, qkv: FrozenLinear, turned: int) -> None:
        self.norm, self.qkv, self.turned = norm, qkv, turned

    def forward(self, x: Tensor, turns: Turns | None) -> tuple[Tensor, Saved]:
        rows, stats = self.norm(x)
        out = self.qkv(rows)
        if turns is not None:
            frozen_layer.rotate_(out, *turns, heads=self.turned)
        return out, (x, stats, *(turns or (None, None)))

    def backward(self, grad: Tensor, added: Tensor | None, saved: Saved) -> Tensor:
        x, stats, cos, sin = saved
        assert x is not None and stats is not None
        if cos is not None:
            assert sin is not None
            # Autograd may hold on to what it handed over.
            grad = frozen_layer.rotate_(grad.clone(), cos, sin, heads=self.turned, back=True)
        return self.norm.gradient(self.qkv.gradient(grad), x, stats, added)


class LastNorm:
    """Hidden states to those that the head reads."""

    def __init__(self, norm: Norm) -> None:
        self.norm = norm

    def forward(self, x: Tensor, turns: Turns | None) -> tuple[Tensor, Saved]:
        rows, stats = self.norm(x)
        return rows, (x, stats)

    def backward(self, grad: Tensor, added: Tensor | None, saved: Saved) -> Tensor:
        x, stats = saved
        assert x is not None and stats is not None
        return self.norm.gradient(grad, x, stats, added)


class OutOfAttention(NamedTuple):
    """What attention found and the hidden states that went into the layer, to those that come out of it."""

    out: FrozenLinear
    norm: Norm
    up: FrozenLinear
    activation: str
    down: FrozenLinear

    def forward(self, seen: Tensor, x: Tensor) -> tuple[Tensor, Saved]:
        middle = self.out(seen, x)
        rows, stats = self.norm(middle)
        inner = self.up(rows)
        return self.down(frozen_layer.activation(inner, self.activation), middle), (middle, stats, inner)

    def backward(self, grad: Tensor, saved: Saved, wanted: bool) -> tuple[Tensor | None, Tensor]:
        """By what attention found (None unless ``wanted``), and by the hidden states."""
        middle, stats, inner = saved
        assert middle is not None and stats is not None and inner is not None
        by_inner = frozen_layer.activation_gradient(self.down.gradient(grad), inner, self.activation)
        by_middle = self.norm.gradient(self.up.gradient(by_inner), middle, stats, grad)
        return self.out.gradient(by_middle) if wanted else None, by_middle


class Segment(NamedTuple):
    """What lies between two attentions: out of one (None before the first) and into the next (or into the head)."""

    before: OutOfAttention | None
    after: IntoAttention | LastNorm


class _Between(torch.autograd.Function):
    """A segment as one function of ``seen`` ``[T, heads * head_dim]`` (None for the first) and hidden states ``[T, hidden]``.

    Returns what goes into the next attention, and the hidden states there, which for the first are those that came."""

    @staticmethod
    def forward(ctx: Any, seen: Tensor | None, x: Tensor, segment: Segment, turns: Turns | None) -> Any:
        ctx.set_materialize_grads(False)
        saved: Saved = ()
        if segment.before is not None:
            assert seen is not None
            x, saved = segment.before.forward(seen, x)
        out, kept = segment.after.forward(x, turns)
        ctx.segment, ctx.count = segment, len(saved)
        ctx.save_for_backward(*saved, *kept)
        return out if segment.before is None or isinstance(segment.after, LastNorm) else (out, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, by_states: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if grad is None and by_states is None:
            return None, None, None, None
        tensors, segment = ctx.saved_tensors, ctx.segment
        saved, kept = tensors[: ctx.count], tensors[ctx.count :]
        by_x = by_states if grad is None else segment.after.backward(grad, by_states, kept)
        by_seen = None
        if segment.before is not None:
            by_seen, by_x = segment.before.backward(by_x, saved, ctx.needs_input_grad[0])
        return by_seen, by_x, None, None


class Layers(NamedTuple):
    """A body: segments, and by layer the geometry of its attention."""

    segments: list[Segment]
    attend: list[Callable[[AttentionContext, Tensor], Tensor]]  # queries, keys and values [T, ...] to [T, heads * dim]

    def run(self, x: Tensor, context: AttentionContext, turns: Turns | None) -> Tensor:
        """Hidden states ``[T, hidden]`` through all layers and the last norm."""
        heard = _Between.apply(None, x, self.segments[0], turns)
        for attend, segment in zip(self.attend, self.segments[1:-1], strict=False):
            heard, x = _Between.apply(attend(context, heard), x, segment, turns)
        return _Between.apply(self.attend[-1](context, heard), x, self.segments[-1], turns)


def _attention(index: int, heads: int, kv_heads: int, scale: float, window: int | None) -> Callable[..., Tensor]:
    def attend(context: AttentionContext, heard: Tensor) -> Tensor:
        parts = heard.unflatten(1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], dim=1)
        seen = context.attend(index, *parts, scale=scale, window=window, softcap=None)
        return seen.reshape(heard.shape[0], -1)

    return attend


def _segments(into: list[IntoAttention], out: list[OutOfAttention], last: Norm) -> list[Segment]:
    after: list[IntoAttention | LastNorm] = [*into, LastNorm(last)]
    return [Segment(before, following) for before, following in zip([None, *out], after, strict=True)]


# ---- the families ----------------------------------------------------------------------------------------------------


def gpt2_forward(body: Any, pages: LargePages) -> Callable[..., SimpleNamespace]:
    """What GPT-2's body may call in place of its own forward. Raises Unlike for a layer that is not exactly GPT-2's."""
    into, out, attend = [], [], []
    for index, block in enumerate(body.h):
        require_gpt2_layer(block)
        attn, mlp = block.attn, block.mlp
        into.append(IntoAttention(_layer_norm(block.ln_1), FrozenLinear(pages, attn.c_attn), 0))
        up, down = FrozenLinear(pages, mlp.c_fc), FrozenLinear(pages, mlp.c_proj)
        out.append(OutOfAttention(FrozenLinear(pages, attn.c_proj), _layer_norm(block.ln_2), up, "gelu_tanh", down))
        attend.append(_attention(index, attn.num_heads, attn.num_heads, attn.scaling, None))
    layers = Layers(_segments(into, out, _layer_norm(body.ln_f)), attend)
    positions = body.wpe.weight

    def forward(*, inputs_embeds, position_ids, lmvae, use_cache=False):
        x = inputs_embeds.squeeze(0) + torch.nn.functional.embedding(position_ids.squeeze(0), positions)
        return SimpleNamespace(last_hidden_state=layers.run(x, lmvae, None).unsqueeze(0))

    return forward


def llama_forward(body: Any, windows: dict[int, int | None], pages: LargePages) -> Callable[..., SimpleNamespace]:
    """The same of Llama, Mistral and Qwen2."""
    require(type(body) in LLAMAS and body.config.hidden_act == "silu", "another activation")
    into, out, attend = [], [], []
    for index, block in enumerate(body.layers):
        require_llama_layer(body, block)
        attn, mlp = block.self_attn, block.mlp
        require(not hasattr(attn, "q_norm"), "norms of queries and keys")
        for part in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            linear_weight(part)  # whatever else it may be, a quantised one say, is no product of ours
        require(mlp.gate_proj.bias is None and mlp.up_proj.bias is None, "a bias in a gated layer")
        kv_heads, heads = (part.weight.shape[0] // attn.head_dim for part in (attn.k_proj, attn.q_proj))
        qkv = FrozenLinear(pages, attn.q_proj, attn.k_proj, attn.v_proj)
        into.append(IntoAttention(_rms_norm(block.input_layernorm), qkv, heads + kv_heads))
        up, down = FrozenLinear(pages, mlp.gate_proj, mlp.up_proj), FrozenLinear(pages, mlp.down_proj)
        second = _rms_norm(block.post_attention_layernorm)
        out.append(OutOfAttention(FrozenLinear(pages, attn.o_proj), second, up, "swiglu", down))
        attend.append(_attention(index, heads, kv_heads, attn.scaling, windows[index]))
    layers = Layers(_segments(into, out, _rms_norm(body.norm)), attend)

    def forward(*, inputs_embeds, position_ids, lmvae, use_cache=False):
        cos, sin = (part.squeeze(0) for part in body.rotary_emb(inputs_embeds, position_ids=position_ids))
        x = inputs_embeds.squeeze(0)
        return SimpleNamespace(last_hidden_state=layers.run(x, lmvae, (cos, sin)).unsqueeze(0))

    return forward


def _layer_norm(module: nn.LayerNorm) -> Norm:
    require(type(module) is nn.LayerNorm and module.bias is not None, "another norm")
    return Norm(module.weight.detach(), module.bias.detach(), module.eps)


def _rms_norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), None, module.variance_epsilon)
