"""Our attention inside any Hugging Face decoder, through transformers' attention registry: no model file is forked.

transformers calls the registered function once per layer and passes unknown keyword arguments of ``model(...)`` down to
it; ours arrive as one object, either a :class:`PackedAttention` (a whole packed batch in one pass) or a
:class:`~lmvae_fast.models.decoder.cache.LatentCache` (one token per sentence over a static cache).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from lmvae_fast.errors import UnsupportedDecoderError
from lmvae_fast.kernels.latent_attention import latent_attention
from lmvae_fast.models.decoder.position_columns import with_positions

ATTENTION = "lmvae"
# For decoders that need more than queries, keys and values of one width handed down by keyword (general_attention.py).
GENERAL = "lmvae_general"
# What decoders pass to an attention function and what may be ignored because it changes nothing for us.
_HARMLESS = {
    "attention_mask",
    "position_ids",
    "cache_position",
    "use_cache",
    "is_causal",
    "position_embeddings",
    "return_dict",
    "cache",
    "past_key_values",
    "seq_idx",
    "layer_idx",
    "tgt_len",
}


class AttentionContext(Protocol):
    """What stands behind one call of a decoder's body."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attention output ``[tokens, heads, head_dim]`` for packed q, k, v of one layer. Those that a decoder is run with
        take ``sinks`` ``[heads]``, too."""
        ...


@dataclass
class PackedAttention:
    """A packed batch under a memory: every sentence attends to its own slots and its own tokens.

    ``memory`` is ``[layers, 2, batch, kv_heads, slots, head_dim]`` or None for plain causal attention; in the last
    ``position_columns`` of a slot's key stands where it is, whatever the memory holds there (ALiBi).
    """

    memory: Tensor | None
    visibility: str
    cu_seqlens: Tensor
    max_seqlen: int
    position_columns: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        # Taken apart once: the backward of indexing would fill and add a zero tensor of the whole memory for every layer. At
        # once, in the grad mode that is on here, and where torch.compile can follow.
        memory = None if self.memory is None or self.memory.shape[4] == 0 else self.memory
        if memory is not None and self.position_columns:
            memory = with_positions(memory, self.visibility)
        self._parts = None if memory is None else memory.flatten(0, 1).unbind(0)

    def attend(self, layer, query, key, value, *, scale, window, softcap, sinks=None):
        """See :class:`AttentionContext`."""
        memory_k = memory_v = None
        if self._parts is not None:
            memory_k, memory_v = self._parts[2 * layer : 2 * layer + 2]
            memory_k, memory_v = memory_k.to(key.dtype), memory_v.to(value.dtype)
        return latent_attention(
            query,
            key,
            value,
            memory_k,
            memory_v,
            cu_seqlens=self.cu_seqlens,
            visibility=self.visibility,
            scale=scale,
            max_seqlen=self.max_seqlen,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )


@dataclass
class RecordingAttention(PackedAttention):
    """Plain causal attention that notes what every layer asked for; used once, to examine a decoder."""

    modules: dict[int, nn.Module] = field(default_factory=dict)
    shapes: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)
    widths: dict[int, tuple[int, int]] = field(default_factory=dict)  # of keys and values as the layer has them
    sinks: bool = False
    columns: bool = False
    masked: bool = False

    def attend(self, layer, query, key, value, *, scale, window, softcap, sinks=None):
        """See :class:`AttentionContext`."""
        if query.shape[-1] != value.shape[-1]:
            raise UnsupportedDecoderError(
                f"layer {layer} has values of another width than its queries",
                value=f"{value.shape[-1]} and {query.shape[-1]}",
                remedy="use a decoder with one head_dim",
            )
        if layer in self.shapes:
            raise UnsupportedDecoderError(
                f"layer {layer} attends more than once, so a memory would not stand for entries of its cache",
                remedy="use a decoder with one attention per layer",
            )
        self.shapes[layer] = (query.shape[1], key.shape[1], key.shape[2])
        self.widths.setdefault(layer, (key.shape[2], value.shape[2]))
        self.windows[layer] = window
        return super().attend(layer, query, key, value, scale=scale, window=window, softcap=softcap, sinks=sinks)


def refuse_unknown(module: nn.Module, dropout: float, other: dict[str, Any]) -> None:
    """Raise UnsupportedDecoderError where a layer asks for something that we would ignore."""
    given = {name for name, value in other.items() if value is not None}
    # What a model returns besides (output_attentions, output_router_logits, ...) changes no hidden state.
    unknown = {name for name in given if name not in _HARMLESS and not name.startswith("output_")}
    if unknown:
        raise UnsupportedDecoderError(
            f"{type(module).__name__} asks for attention features we do not honour", value=", ".join(sorted(unknown))
        )
    if dropout:
        raise UnsupportedDecoderError(
            f"{type(module).__name__} asks for dropout on attention weights", value=dropout, limit=0.0
        )


def latent_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    lmvae: AttentionContext | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls: query ``[1, heads, T, head_dim]``, key and value ``[1, kv_heads, T, head_dim]``.

    Returns ``[1, T, heads, head_dim]`` and no attention weights. Anything a layer asks for that we would ignore raises
    UnsupportedDecoderError, so that no decoder is silently computed wrong.
    """
    if lmvae is None:
        raise UnsupportedDecoderError(
            "this decoder's attention was handed over to lmvae_fast",
            remedy="call it through LMVAE; set_attn_implementation('sdpa') gives it back, and takes it away from LMVAE",
        )
    if dropout or not other.keys() <= _HARMLESS:
        refuse_unknown(module, dropout, other)
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedDecoderError(f"{type(module).__name__} does not say which layer it is (layer_idx)")
    if isinstance(lmvae, RecordingAttention):
        lmvae.modules[layer] = module
        lmvae.masked = lmvae.masked or attention_mask is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # [1, heads, T, D] -> [T, heads, D]: views; the kernel reads strides.
    packed = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    out = lmvae.attend(layer, *packed, scale=scale, window=sliding_window, softcap=softcap)
    return out.unsqueeze(0), None


# No mask function is registered under this name: transformers then builds no mask at all, and ours follows from
# cu_seqlens and the visibility.
AttentionInterface.register(ATTENTION, latent_attention_forward)


def without_attention_dropout(module: nn.Module) -> float:
    """Switch off dropout on attention weights in one attention module; returns the probability it had."""
    before = 0.0
    # "dropout" as a plain number is OPT's attention dropout; as a module it would be another dropout.
    for name in ("attention_dropout", "attn_dropout", "dropout"):
        value = getattr(module, name, None)
        if isinstance(value, nn.Dropout) and name != "dropout":
            before, value.p = max(before, value.p), 0.0
        elif isinstance(value, float):
            before = max(before, value)
            setattr(module, name, 0.0)
    return before
