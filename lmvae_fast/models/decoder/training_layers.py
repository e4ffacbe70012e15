"""The layers of GPT-2 and of Llama's family written out for training: forward, and backward to the inputs alone.

Between two attentions a frozen decoder has one function to autograd: out of a layer's attention, through its MLP, into the
queries, keys and values of the next. Its weights are prepared once for both passes (frozen_products.py), what stands between
the products is fused (kernels/frozen_layer), and it keeps what its gradient needs and nothing else: the rows that go into the
two norms, and what goes into the activation (what adapters read besides is made again). Attention itself stays
`latent_attention` with a gradient of its own. A sum of hidden states is made by the product before it (on a CPU) or by the norm
behind it (on CUDA, `Sum`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.models.gpt2 import modeling_gpt2 as gpt2

from lmvae_fast.kernels import frozen_layer
from lmvae_fast.models.decoder.attention import AttentionContext
from lmvae_fast.models.decoder.frozen_products import FrozenLinear
from lmvae_fast.models.decoder.large_pages import LargePages
from lmvae_fast.models.decoder.linear_weights import linear_weight, require
from lmvae_fast.models.decoder.low_rank import without_adapter
from lmvae_fast.models.decoder.prepared_layers import (
    LLAMAS,
    activation_of,
    norms_of,
    require_gpt2_layer,
    require_llama_layer,
    rms_of,
    rotation_of,
    rotations,
    softcap_of,
)

if TYPE_CHECKING:
    from lmvae_fast.models.decoder.decoder import Decoder

Saved = tuple[Tensor | None, ...]
Turns = tuple[Tensor, Tensor]  # cosines and sines [T, head_dim]


class Sum(NamedTuple):
    """Hidden states ``[T, hidden]``, which ``added`` are still to be added to."""

    states: Tensor
    added: Tensor | None = None


def _summed(product: FrozenLinear, x: Tensor, added: Tensor, behind: Norm | None) -> tuple[Sum, Saved]:
    """A product, normed where a norm stands behind it, still to be added or added; and what that norm's gradient needs."""
    if behind is not None:
        out = product(x)
        rows, stats = behind(out)
        return Sum(added, rows), (out, stats)
    return (Sum(product(x, added)) if product.sums else Sum(product(x), added)), ()


def _by_product(grad: Tensor, behind: Norm | None, saved: Sequence[Tensor | None]) -> Tensor:
    """The gradient by a product's result, given that by its sum."""
    if behind is None:
        return grad
    out, stats = saved
    assert out is not None and stats is not None
    return behind.gradient(grad, out, stats, None)


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

    def of_sum(self, states: Sum) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, their rows, and what `gradient` needs."""
        x, added = states
        if added is None:
            return x, *self(x)
        return frozen_layer.add_norm(x, added, self.weight, self.bias, eps=self.eps, centred=self.bias is not None)


class HeadNorm(NamedTuple):
    """A norm of every head in some columns of queries, keys and values."""

    norm: Norm
    columns: slice

    def __call__(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Changes the columns in place; the heads as they were, and what `gradient_` needs of them."""
        part = out[:, self.columns]
        # A copy always: of a single row, the columns lie in one piece, and would be changed below.
        heads = part.clone(memory_format=torch.contiguous_format).view(-1, self.norm.weight.shape[0])
        rows, stats = self.norm(heads)
        part.copy_(rows.view_as(part))
        return heads, stats

    def gradient_(self, grad: Tensor, heads: Tensor, stats: Tensor) -> None:
        part = grad[:, self.columns]
        rows = part.reshape(heads.shape)
        part.copy_(self.norm.gradient(rows, heads, stats, None).view_as(part))


class IntoAttention:
    """Hidden states to queries, keys and values side by side, heads with a norm of their own or not, the first ``turned``
    of them at their positions."""

    def __init__(self, norm: Norm, qkv: FrozenLinear, turned: int, of_heads: Sequence[HeadNorm] = ()) -> None:
        self.norm, self.qkv, self.turned, self.of_heads = norm, qkv, turned, of_heads

    def forward(self, states: Sum, turns: Turns | None) -> tuple[Tensor, Tensor, Saved]:
        """Queries, keys and values; the hidden states, summed; what `backward` needs."""
        x, rows, stats = self.norm.of_sum(states)
        out = self.qkv(rows)
        kept = [tensor for norm in self.of_heads for tensor in norm(out)]
        if turns is not None:
            frozen_layer.rotate_(out, *turns, heads=self.turned)
        return out, x, (x, stats, *(turns or (None, None)), *kept)

    def backward(self, grad: Tensor, added: Tensor | None, saved: Saved) -> tuple[Tensor, list[Tensor]]:
        x, stats, cos, sin, *kept = saved
        assert x is not None and stats is not None
        if cos is not None:
            assert sin is not None
            # Autograd may hold on to what it handed over.
            grad = frozen_layer.rotate_(grad.clone(), cos, sin, heads=self.turned, back=True)
        for norm, heads, of_head in zip(self.of_heads, kept[::2], kept[1::2], strict=True):
            assert heads is not None and of_head is not None
            norm.gradient_(grad, heads, of_head)
        by_rows, trained = self.qkv.gradient(grad, lambda: self.norm(x)[0])
        return self.norm.gradient(by_rows, x, stats, added), trained

    def trained(self) -> list[Tensor]:
        return self.qkv.trained()


class LastNorm:
    """Hidden states to those that the head reads."""

    def __init__(self, norm: Norm) -> None:
        self.norm = norm

    def forward(self, states: Sum, turns: Turns | None) -> tuple[Tensor, Tensor, Saved]:
        """As `IntoAttention.forward`."""
        x, rows, stats = self.norm.of_sum(states)
        return rows, x, (x, stats)

    def backward(self, grad: Tensor, added: Tensor | None, saved: Saved) -> tuple[Tensor, list[Tensor]]:
        x, stats = saved
        assert x is not None and stats is not None
        return self.norm.gradient(grad, x, stats, added), []

    def trained(self) -> list[Tensor]:
        return []


class OutOfAttention(NamedTuple):
    """What attention found and the hidden states that went into the layer, to those that come out of it. behind: norms of what
    ``out`` and ``down`` give, before it is added (Gemma 2 and 3)."""

    out: FrozenLinear
    norm: Norm
    up: FrozenLinear
    activation: str
    down: FrozenLinear
    behind: tuple[Norm | None, Norm | None] = (None, None)

    def forward(self, seen: Tensor, x: Tensor) -> tuple[Sum, Saved]:
        states, of_out = _summed(self.out, seen, x, self.behind[0])
        middle, rows, stats = self.norm.of_sum(states)
        inner = self.up(rows)
        states, of_down = _summed(self.down, frozen_layer.activation(inner, self.activation), middle, self.behind[1])
        return states, (middle, stats, inner, seen if self.out.adapters else None, *of_out, *of_down)

    def backward(self, grad: Tensor, saved: Saved, wanted: bool) -> tuple[Tensor | None, Tensor, list[Tensor]]:
        """By what attention found (None unless ``wanted``), by the hidden states, and by what trains here."""
        middle, stats, inner, seen, *of_norms = saved
        assert middle is not None and stats is not None and inner is not None
        by_down = _by_product(grad, self.behind[1], of_norms[-2:])
        by_act, of_down = self.down.gradient(by_down, lambda: frozen_layer.activation(inner, self.activation))
        by_inner = frozen_layer.activation_gradient(by_act, inner, self.activation)
        by_rows, of_up = self.up.gradient(by_inner, lambda: self.norm(middle)[0])
        by_middle = self.norm.gradient(by_rows, middle, stats, grad)
        if not (wanted or self.out.adapters):
            return None, by_middle, of_up + of_down
        by_out = _by_product(by_middle, self.behind[0], of_norms[:2])
        by_seen, of_out = self.out.gradient(by_out, lambda: cast(Tensor, seen))
        return by_seen, by_middle, of_out + of_up + of_down

    def trained(self) -> list[Tensor]:
        return self.out.trained() + self.up.trained() + self.down.trained()


class Segment(NamedTuple):
    """What lies between two attentions: out of one (None before the first) and into the next (or into the head)."""

    before: OutOfAttention | None
    after: IntoAttention | LastNorm

    def trained(self) -> list[Tensor]:
        """Adapters, in the order of their gradients."""
        return [*(self.before.trained() if self.before is not None else ()), *self.after.trained()]


class _Between(torch.autograd.Function):
    """A segment as one function of ``seen`` ``[T, heads * head_dim]`` (None for the first), of hidden states ``[T, hidden]``
    and of what trains in it.

    Returns what goes into the next attention, and the hidden states there, which for the first are those that came."""

    @staticmethod
    def forward(
        ctx: Any, seen: Tensor | None, x: Tensor, segment: Segment, turns: Turns | None, *trained: Tensor
    ) -> Any:
        ctx.set_materialize_grads(False)
        saved: Saved = ()
        states = Sum(x)
        if segment.before is not None:
            assert seen is not None
            states, saved = segment.before.forward(seen, x)
        out, x, kept = segment.after.forward(states, turns)
        ctx.segment, ctx.count, ctx.trained = segment, len(saved), len(trained)
        # Adapters too: autograd then refuses a gradient after they were changed in place.
        ctx.save_for_backward(*saved, *kept, *trained)
        return out if segment.before is None or isinstance(segment.after, LastNorm) else (out, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, by_states: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if grad is None and by_states is None:
            return (None,) * len(ctx.needs_input_grad)
        tensors, segment = ctx.saved_tensors, ctx.segment
        saved, kept = tensors[: ctx.count], tensors[ctx.count : len(tensors) - ctx.trained]
        by_x, of_after = (by_states, None) if grad is None else segment.after.backward(grad, by_states, kept)
        by_seen, of_before = None, []
        if segment.before is not None:
            by_seen, by_x, of_before = segment.before.backward(by_x, saved, ctx.needs_input_grad[0])
        if of_after is None:
            of_after = [None] * len(segment.after.trained())
        return by_seen, by_x, None, None, *of_before, *of_after


class Attend(NamedTuple):
    """The attention of a layer: queries, keys and values ``[T, (heads + 2 kv_heads) * dim]`` to ``[T, heads * dim]``."""

    layer: int
    heads: int
    kv_heads: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    def __call__(self, context: AttentionContext, heard: Tensor) -> Tensor:
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        parts = heard.unflatten(1, (sum(sizes), -1)).split(sizes, dim=1)
        seen = context.attend(self.layer, *parts, scale=self.scale, window=self.window, softcap=self.softcap)
        return seen.reshape(heard.shape[0], -1)


class Layers(NamedTuple):
    """A body: segments, and by layer the geometry of its attention."""

    segments: list[Segment]
    attend: list[Attend]

    def run(self, x: Tensor, context: AttentionContext, turns: Sequence[Turns | None]) -> Tensor:
        """Hidden states ``[T, hidden]`` through all layers, each with its rotation, and the last norm."""

        def between(seen: Tensor | None, x: Tensor, segment: Segment, turns: Turns | None) -> Any:
            return _Between.apply(seen, x, segment, turns, *segment.trained())

        heard = between(None, x, self.segments[0], turns[0])
        for attend, segment, turned in zip(self.attend[:-1], self.segments[1:-1], turns[1:], strict=True):
            heard, x = between(attend(context, heard), x, segment, turned)
        return between(self.attend[-1](context, heard), x, self.segments[-1], None)


def _segments(into: list[IntoAttention], out: list[OutOfAttention], last: Norm) -> list[Segment]:
    after: list[IntoAttention | LastNorm] = [*into, LastNorm(last)]
    return [Segment(before, following) for before, following in zip([None, *out], after, strict=True)]


# ---- the families ----------------------------------------------------------------------------------------------------


class Runs(Protocol):
    """What goes through a body's layers: `Layers`, or what has them."""

    def run(self, x: Tensor, context: AttentionContext, turns: Sequence[Turns | None]) -> Tensor:
        """See `Layers.run`."""
        ...


def written_out(
    decoder: Decoder, pages: LargePages, by: Callable[[Layers], Runs] = lambda layers: layers
) -> Callable[..., SimpleNamespace] | None:
    """What a decoder's body may call in place of its own forward; None for a family that is not written out here. by: makes
    what goes through the layers.

    Raises Unlike for a layer that is not exactly what is written out."""
    body: Any = decoder.body
    if type(body) is gpt2.GPT2Model:
        return _gpt2_forward(body, pages, by)
    return _llama_forward(body, decoder.windows, pages, by) if type(body) in LLAMAS else None


def _gpt2_forward(body: Any, pages: LargePages, by: Callable[[Layers], Runs]) -> Callable[..., SimpleNamespace]:
    """What GPT-2's body may call in place of its own forward. Raises Unlike for a layer that is not exactly GPT-2's."""
    into, out, attend = [], [], []
    dtype = body.wpe.weight.dtype  # vectors may be wider where adapters train
    for index, block in enumerate(body.h):
        require_gpt2_layer(block)
        attn, mlp = block.attn, block.mlp
        into.append(IntoAttention(_layer_norm(block.ln_1, dtype), FrozenLinear(pages, attn.c_attn), 0))
        up, down = FrozenLinear(pages, mlp.c_fc), FrozenLinear(pages, mlp.c_proj)
        out.append(
            OutOfAttention(FrozenLinear(pages, attn.c_proj), _layer_norm(block.ln_2, dtype), up, "gelu_tanh", down)
        )
        attend.append(Attend(index, attn.num_heads, attn.num_heads, attn.scaling))
    layers = by(Layers(_segments(into, out, _layer_norm(body.ln_f, dtype)), attend))
    positions, none = body.wpe.weight, [None] * len(attend)

    def forward(*, inputs_embeds, position_ids, lmvae, use_cache=False):
        x = inputs_embeds.squeeze(0) + torch.nn.functional.embedding(position_ids.squeeze(0), positions)
        return SimpleNamespace(last_hidden_state=layers.run(x, lmvae, none).unsqueeze(0))

    return forward


def _llama_forward(
    body: Any, windows: dict[int, int | None], pages: LargePages, by: Callable[[Layers], Runs]
) -> Callable[..., SimpleNamespace]:
    """The same of Llama, Mistral, Qwen2, Qwen3, and Gemma 1 to 3."""
    activation = activation_of(body)
    into, out, attend = [], [], []
    dtype = body.embed_tokens.weight.dtype
    for index, block in enumerate(body.layers):
        require_llama_layer(body, block)
        attn, mlp = block.self_attn, block.mlp
        parts = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        for part in map(without_adapter, parts):
            linear_weight(part)  # whatever else it may be, a quantised one say, is no product of ours
        require(mlp.gate_proj.bias is None and mlp.up_proj.bias is None, "a bias in a gated layer")
        dim = attn.head_dim
        kv_heads, heads = (part.weight.shape[0] // dim for part in (attn.k_proj, attn.q_proj))
        of_heads = []
        if hasattr(attn, "q_norm"):
            columns = slice(heads * dim), slice(heads * dim, (heads + kv_heads) * dim)
            of_heads = [
                HeadNorm(_rms_norm(n, dtype), c) for n, c in zip((attn.q_norm, attn.k_norm), columns, strict=True)
            ]
        qkv = FrozenLinear(pages, attn.q_proj, attn.k_proj, attn.v_proj)
        first, behind_out, second, behind_down = (n and _rms_norm(n, dtype) for n in norms_of(block))
        into.append(IntoAttention(first, qkv, heads + kv_heads, of_heads))
        up, down = FrozenLinear(pages, mlp.gate_proj, mlp.up_proj), FrozenLinear(pages, mlp.down_proj)
        behind = behind_out, behind_down
        out.append(OutOfAttention(FrozenLinear(pages, attn.o_proj), second, up, activation, down, behind))
        attend.append(Attend(index, heads, kv_heads, attn.scaling, windows[index], softcap_of(attn)))
    layers = by(Layers(_segments(into, out, _rms_norm(body.norm, dtype)), attend))
    kinds = [rotation_of(body, index) for index in range(len(attend))]

    def forward(*, inputs_embeds, position_ids, lmvae, use_cache=False):
        x = inputs_embeds.squeeze(0)
        turns = {kind: (cos.squeeze(0), sin.squeeze(0))
                 for kind, (cos, sin) in rotations(body, inputs_embeds, position_ids).items()}  # fmt: skip
        return SimpleNamespace(last_hidden_state=layers.run(x, lmvae, [turns[kind] for kind in kinds]).unsqueeze(0))

    return forward


def _layer_norm(module: nn.LayerNorm, dtype: torch.dtype) -> Norm:
    require(type(module) is nn.LayerNorm and module.bias is not None, "another norm")
    return Norm(module.weight.detach().to(dtype), module.bias.detach().to(dtype), module.eps)


def _rms_norm(module: Any, dtype: torch.dtype) -> Norm:
    weight, eps = rms_of(module)
    gemmas = weight.data_ptr() != module.weight.data_ptr()  # 1 + w, which is not rounded
    return Norm(weight if gemmas else weight.to(dtype), None, eps)
