"""Whether a decoder can be run through our attention at all, and with which geometry: found out once, before it is used.

Every layer must go through our attention with one head geometry, and without a memory the result must equal the model's own.
A decoder that fails is refused, never computed wrong.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmvae_fast.errors import UnsupportedDecoderError
from lmvae_fast.models.decoder.activations import fuse_activations
from lmvae_fast.models.decoder.attention import (
    ATTENTION,
    AttentionContext,
    RecordingAttention,
    without_attention_dropout,
)

logger = logging.getLogger(__name__)

_EXAMINED = (5, 3)  # tokens of the two sentences that every decoder is examined with
_LAYER_KINDS = ("full_attention", "sliding_attention")
_DECODERS = "use a decoder with key-value attention in every layer (GPT-2, Llama, Qwen, Mistral, Gemma, ...)"


class Examined(Protocol):
    """What is examined of a decoder: its model, and how it is run."""

    model: PreTrainedModel
    trains: bool
    vocab_size: int

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def run(
        self, input_ids: Tensor, position_ids: Tensor, shift: Tensor | None, context: AttentionContext
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Geometry:
    """Layers of a decoder, the heads of each, and by layer its sliding window (None: it sees everything)."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: dict[int, int | None]


def examine(decoder: Examined) -> Geometry:
    """Learn the head geometry, and prove on eight packed tokens that our path computes this model's own logits.

    Raises UnsupportedDecoderError otherwise.
    """
    name = type(decoder.model).__name__
    try:
        expected, plain = _eager_logits(decoder)
        fuse_activations(decoder.model)  # here, so that the comparison below covers it
        seen, got = _packed_logits(decoder)
    except UnsupportedDecoderError as error:
        if "handed over" in error.problem:
            raise UnsupportedDecoderError(
                f"{name} does not pass keyword arguments down to its attention", remedy=_DECODERS
            ) from error
        raise
    except (ValueError, AttributeError, TypeError, RuntimeError, KeyError, IndexError) as error:
        raise UnsupportedDecoderError(
            f"{name} cannot be run through our attention: {error}", remedy=_DECODERS
        ) from error
    _check_layers(decoder.model.config.get_text_config(decoder=True), name, seen)
    geometry = Geometry(len(seen.shapes), *seen.shapes[0], windows=seen.windows)
    # Another order of the same sums: some units in the last place per layer. Eager attention works in float32 at best.
    eps = max(torch.finfo(decoder.dtype).eps, torch.finfo(torch.float32).eps)
    tolerance = min(16 * eps * geometry.layers**0.5, 0.1)
    last = slice(_EXAMINED[0], None)
    if not _relative(expected[last], plain) > 0:
        raise UnsupportedDecoderError(
            f"{name} takes no notice of position ids, so a memory cannot stand before its tokens", remedy=_DECODERS
        )
    difference = _relative(got, expected)
    if not difference <= tolerance:
        raise UnsupportedDecoderError(
            f"{name} computes something that our attention or head leaves out",
            value=f"logits off by {difference:.2e} of their norm",
            limit=f"{tolerance:.1e}",
            remedy="report the model; scaled logits, attention sinks and biased scores are not honoured yet",
        )
    dropped = max(without_attention_dropout(module) for module in seen.modules.values())
    if decoder.trains and dropped:
        logger.warning("%s: dropout %.2g on attention weights is switched off (our attention has none)", name, dropped)
    return geometry


@torch.no_grad()
def _eager_logits(decoder: Examined) -> tuple[Tensor, Tensor]:
    """The model's own logits of both examined sentences ``[8, vocabulary]``, and of the second at positions 0, 1, 2."""
    decoder.model.set_attn_implementation("eager")
    first, second = _examined_ids(decoder).split(_EXAMINED)

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        out = decoder.model(
            input_ids=ids[None],
            attention_mask=torch.ones_like(ids[None]),
            position_ids=positions[None],
            use_cache=False,
        )
        return out.logits[0].float()

    places = torch.arange(len(first), device=decoder.device)
    plain = logits(second, places[: len(second)])
    return torch.cat([logits(first, places), logits(second, 2 * places[: len(second)] + 1)]), plain


@torch.no_grad()
def _packed_logits(decoder: Examined) -> tuple[RecordingAttention, Tensor]:
    """The same two sentences packed through our attention: what its layers asked for, and the logits."""
    decoder.model.set_attn_implementation(ATTENTION)
    lengths = torch.tensor([0, *_EXAMINED], device=decoder.device)
    seen = RecordingAttention(None, "prefix", lengths.cumsum(0).to(torch.int32), max(_EXAMINED))
    # The second sentence stands at positions 1, 3, 5, as tokens between slots do.
    positions = torch.cat([torch.arange(n, device=decoder.device) for n in _EXAMINED])
    positions[_EXAMINED[0] :] = 2 * positions[_EXAMINED[0] :] + 1
    hidden = decoder.run(_examined_ids(decoder), positions, None, seen)
    return seen, decoder.logits(hidden).float()


def _examined_ids(decoder: Examined) -> Tensor:
    return torch.arange(1, sum(_EXAMINED) + 1, device=decoder.device) * 7 % decoder.vocab_size


def _check_layers(config: Any, name: str, seen: RecordingAttention) -> None:
    """Raises UnsupportedDecoderError unless every layer came through our attention, alike, and with its window."""
    layers = getattr(config, "num_hidden_layers", None)
    if not seen.shapes or sorted(seen.shapes) != list(range(layers or len(seen.shapes))):
        raise UnsupportedDecoderError(
            f"{name} has layers without keys and values, which a memory cannot reach",
            value=f"{len(seen.shapes)} attention layers of {layers}",
            remedy="use a decoder with attention everywhere",
        )
    if len(set(seen.shapes.values())) != 1:
        raise UnsupportedDecoderError(
            f"{name} has layers of different head geometry",
            value=sorted(set(seen.shapes.values())),
            limit="one (heads, kv_heads, head_dim) in all layers",
        )
    # A window that acts through Hugging Face's mask alone would be lost on us, and eight tokens would not show it.
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in _LAYER_KINDS or (kind == "sliding_attention" and seen.windows.get(layer) is None):
            raise UnsupportedDecoderError(
                f"{name}: layer {layer} is of a kind we do not honour",
                value=kind,
                limit=", ".join(_LAYER_KINDS),
                remedy=_DECODERS,
            )


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()
