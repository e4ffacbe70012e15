"""Whether a decoder can be run through our attention at all, and with which geometry: found out once, before it is used.

Every layer must go through our attention with one head geometry; without a memory the result must equal the model's own, in
float32 whatever the weights are held in; a gradient must reach the memory of every layer; and where position ids say nothing
(ALiBi, none at all, counted from the cache), the result under a memory must equal the model's own over a cache that holds it.
A decoder that fails is refused, never computed wrong.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lmvae_fast.errors import UnsupportedDecoderError
from lmvae_fast.models.decoder.activations import fuse_activations
from lmvae_fast.models.decoder.adapters import exchange_attention, exchange_positions
from lmvae_fast.models.decoder.attention import (
    ATTENTION,
    GENERAL,
    AttentionContext,
    PackedAttention,
    RecordingAttention,
    without_attention_dropout,
)
from lmvae_fast.models.decoder.head import Head, find_head
from lmvae_fast.models.decoder.obstacles import keyless_layers, obstacle
from lmvae_fast.models.decoder.position_columns import COLUMNS
from lmvae_fast.models.decoder.way import Way, cache_argument, takes

logger = logging.getLogger(__name__)

_EXAMINED = (5, 3)  # tokens of the two sentences that every decoder is examined with
_LAYER_KINDS = ("full_attention", "sliding_attention", "chunked_attention")
_DECODERS = "use a decoder with key-value attention in every layer (GPT-2, Llama, Qwen, Mistral, Gemma, ...)"


class Examined(Protocol):
    """What is examined of a decoder: its model, and how it is run."""

    model: PreTrainedModel
    trains: bool
    vocab_size: int
    hidden_size: int
    position_offset: int
    way: Way
    head: Head

    @property
    def body(self) -> nn.Module: ...

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
    """Layers of a decoder, the heads of each, and by layer its sliding window (None: it sees everything).

    ``positions``: how many the decoder has, or None for any number. ``hidden_window``: a window that acts through Hugging
    Face's mask alone, so that no sentence may be longer than it; None for none. ``position_columns``: how many numbers of
    a key say where it stands (ALiBi). ``widths``: of keys and values as the model itself has them, head_dim or less.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: dict[int, int | None]
    positions: int | None
    hidden_window: int | None
    position_columns: int = 0
    widths: tuple[int, int] = (0, 0)


def examine(decoder: Examined) -> Geometry:
    """Learn the head geometry, and prove on eight packed tokens that our path computes this model's own logits.

    Sets ``decoder.position_offset`` where the model counts its positions from another number than 0 (RoBERTa).
    Raises UnsupportedDecoderError otherwise.
    """
    name = type(decoder.model).__name__
    config = decoder.model.config.get_text_config(decoder=True)
    if (keyless := keyless_layers(config)) is not None:
        raise UnsupportedDecoderError(f"{name} {keyless[0]}", value=keyless[1], remedy=_DECODERS)
    try:
        with in_float32(decoder.model):
            expected, plain = _eager_logits(decoder, config)
            decoder.head = find_head(decoder.model, decoder.body, decoder.hidden_size, decoder.device)
            fuse_activations(decoder.model)  # here, so that the comparison below covers it
            seen, got = _packed_logits(decoder)
            _check_layers(config, name, seen)
            geometry = _geometry(decoder, config, seen)
            _check_gradient(decoder, geometry, name)
            last = slice(_EXAMINED[0], None)
            moved = _relative(expected[last], plain) > 0
            if not moved:
                # Its own positions are then 0, 1, 2 whatever ids say; ours must make the difference under a memory.
                expected = torch.cat([expected[: _EXAMINED[0]], plain])
                got = _packed_logits(decoder, spread=False)[1]
                _check_memory(decoder, geometry, seen, name)
    except (
        ValueError,
        AttributeError,
        TypeError,
        RuntimeError,
        LookupError,
        AssertionError,
        NotImplementedError,
    ) as error:
        known = obstacle(decoder.model, config)
        if known is not None:
            raise UnsupportedDecoderError(f"{name} {known[0]}", value=known[1], remedy=_DECODERS) from error
        if isinstance(error, UnsupportedDecoderError):
            raise
        raise UnsupportedDecoderError(
            f"{name} cannot be run through our attention: {error}", remedy=_DECODERS
        ) from error
    # Another order of the same sums: some units in the last place per layer. Eager attention works in float32 at best.
    difference = _relative(got, expected)
    if not difference <= _tolerance(geometry):
        known = obstacle(decoder.model, config)
        if known is None and seen.masked:
            known = "changes its attention scores by a mask of its own, layer by layer", None
        if known is not None:
            raise UnsupportedDecoderError(f"{name} {known[0]}", value=known[1], remedy=_DECODERS)
        raise UnsupportedDecoderError(
            f"{name} computes something that our attention or head leaves out",
            value=f"logits off by {difference:.2e} of their norm",
            limit=f"{_tolerance(geometry):.1e}",
            remedy="report the model",
        )
    dropped = max(without_attention_dropout(module) for module in seen.modules.values())
    if decoder.trains and dropped:
        logger.warning("%s: dropout %.2g on attention weights is switched off (our attention has none)", name, dropped)
    return geometry


def _geometry(decoder: Examined, config: Any, seen: RecordingAttention) -> Geometry:
    names = ("max_target_positions", "max_position_embeddings", "max_seq_len")
    positions: int | None = next((value for name in names if (value := getattr(config, name, None))), None)
    if positions is not None:
        positions -= decoder.position_offset
    original = _one_turn_below(config)
    positions = min(original, positions or original) if original else positions
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True) and all(found is None for found in seen.windows.values())
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or "sliding_attention" in kinds
    windows = [window if window and used and sliding else None]
    if kinds is not None and "chunked_attention" in kinds:
        windows.append(getattr(config, "attention_chunk_size", None))
    return Geometry(
        len(seen.shapes),
        *seen.shapes[0],
        windows=seen.windows,
        positions=positions,
        hidden_window=min((value for value in windows if value), default=None),
        position_columns=COLUMNS if seen.columns else 0,
        widths=seen.widths[0],
    )


def _one_turn_below(config: Any) -> int | None:
    """The length past which all positions of a pass are turned by other angles, those of its short sentences too (longrope),
    or attention is of another kind (BigBird's blocks); None for none."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [
        rope,
        *(part for part in rope.values() if isinstance(part, dict)),
    ]  # one for all layers, or one for each kind
    own = getattr(config, "original_max_position_embeddings", None)
    lengths = [
        part.get("original_max_position_embeddings") or own
        for part in parts
        if "longrope" in str(part.get("rope_type", part.get("type", "")))
    ]
    if getattr(config, "attention_type", None) == "block_sparse":
        lengths.append((5 + 2 * config.num_random_blocks) * config.block_size)
    return min((length for length in lengths if length), default=None)


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """While this lasts, half-precision weights are held in float32; afterwards they are the very tensors they were."""
    kept: list[tuple[Any, Tensor]] = []
    try:  # memory may end between two of them
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype in (torch.float16, torch.bfloat16):
                kept.append((tensor, tensor.data))
                tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def _check_gradient(decoder: Examined, geometry: Geometry, name: str) -> None:
    """Raises UnsupportedDecoderError unless a gradient reaches the memory of every layer."""
    shape = (geometry.layers, 2, 1, geometry.kv_heads, 2, geometry.head_dim)
    pattern = torch.linspace(-1, 1, shape[0] * 4 * shape[3] * shape[5], device=decoder.device)
    ids = _examined_ids(decoder)[: _EXAMINED[0]]
    length = torch.tensor([0, len(ids)], dtype=torch.int32, device=decoder.device)
    positions = torch.arange(2, 2 + len(ids), device=decoder.device)
    with torch.enable_grad():
        memory = pattern.view(shape).to(decoder.dtype).requires_grad_()
        columns = geometry.position_columns
        attention = PackedAttention(memory, "prefix", length, len(ids), position_columns=columns)
        hidden = decoder.run(ids, positions, None, attention)
        weights = torch.linspace(-1, 1, hidden.numel(), device=decoder.device).view_as(hidden)
        # Quantised weights may pass none on at all, or only some layers'.
        found = (
            torch.autograd.grad((hidden * weights).sum(), memory, allow_unused=True)
            if hidden.requires_grad
            else (None,)
        )
        gradient = torch.zeros_like(memory) if found[0] is None else found[0]
    strength = gradient.abs().sum((1, 2, 3, 4, 5))
    if not bool((torch.isfinite(strength) & (strength > 0)).all()):
        layers = [layer for layer, value in enumerate(strength.tolist()) if not 0 < value < float("inf")]
        raise UnsupportedDecoderError(
            f"{name} lets no gradient through to the memory, which could not be learned",
            value=f"layers {layers[:8]}",
            limit="a gradient in every layer",
            remedy="use weights that torch can differentiate through: whole ones, or int8 with activations as they are "
            "(docs/adding_a_decoder.md: quantised decoders)",
        )


@torch.no_grad()
def _eager_logits(decoder: Examined, config: Any) -> tuple[Tensor, Tensor]:
    """The model's own logits of both examined sentences ``[8, vocabulary]``, and of the second at positions 0, 1, 2.

    Sets ``decoder.position_offset``.
    """
    decoder.model.set_attn_implementation("eager")
    first, second = _examined_ids(decoder).split(_EXAMINED)

    def logits(ids: Tensor, positions: Tensor | None) -> Tensor:
        given = {} if positions is None else {"position_ids": positions[None] + decoder.position_offset}
        out = decoder.model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=False, **given)
        return out.logits[0].float()

    places = torch.arange(len(first), device=decoder.device)
    # Where the model itself puts its first token: RoBERTa's positions begin behind the padding token's.
    own = logits(first, None)
    for offset in (0, (getattr(config, "pad_token_id", None) or 0) + 1):
        decoder.position_offset = offset
        if _relative(logits(first, places), own) < 1e-5:
            break
    else:
        raise UnsupportedDecoderError(
            f"{type(decoder.model).__name__} counts its positions in a way of its own", remedy=_DECODERS
        )
    plain = logits(second, places[: len(second)])
    return torch.cat([logits(first, places), logits(second, 2 * places[: len(second)] + 1)]), plain


def _packed_logits(decoder: Examined, spread: bool = True) -> tuple[RecordingAttention, Tensor]:
    """The same two sentences packed through our attention: what its layers asked for, and the logits.

    The second stands at positions 1, 3, 5, as tokens between slots do, or at 0, 1, 2 unless ``spread``. Sets ``decoder.way``
    to the first way of calling the body that works; raises what was wrong with the last where none does.
    """
    failures: list[Exception] = []
    for way in _ways(decoder):
        decoder.way = way
        decoder.model.set_attn_implementation(way.attention)
        try:
            return _recorded(decoder, spread)
        except (UnsupportedDecoderError, ValueError, AttributeError, TypeError, RuntimeError, LookupError) as error:
            failures.append(error)
    # What is wrong with the most general way that is open.
    said = [error for error in failures if "handed over" not in str(error) and "'lmvae'" not in str(error)]
    raise (said or failures)[-1]


def _ways(decoder: Examined) -> list[Way]:
    """Ways to call the body, the cheapest first."""
    # Some hand them on without naming them; those that count for themselves look them up where we can.
    positions = takes(decoder.body, "position_ids") or not exchange_positions(decoder.body)
    if exchange_attention(decoder.body):
        decoder.model.set_attn_implementation("eager")
        own = decoder.model.config.get_text_config(decoder=True)._attn_implementation
        held = any(name.endswith("token_type_ids") for name, _ in decoder.body.named_buffers())
        return [Way(own, False, positions, held and takes(decoder.body, "token_type_ids"))]
    decoder.model.set_attn_implementation(ATTENTION)
    if decoder.model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION:
        raise UnsupportedDecoderError(
            f"{type(decoder.model).__name__} has attention of its own, which cannot be exchanged", remedy=_DECODERS
        )
    return [Way(ATTENTION, True, positions), Way(GENERAL, True, positions), Way(GENERAL, False, positions)]


@torch.no_grad()
def _recorded(decoder: Examined, spread: bool) -> tuple[RecordingAttention, Tensor]:
    lengths = torch.tensor([0, *_EXAMINED], device=decoder.device)
    seen = RecordingAttention(None, "prefix", lengths.cumsum(0).to(torch.int32), max(_EXAMINED))
    positions = torch.cat([torch.arange(n, device=decoder.device) for n in _EXAMINED])
    if spread:
        positions[_EXAMINED[0] :] = 2 * positions[_EXAMINED[0] :] + 1
    hidden = decoder.run(_examined_ids(decoder), positions, None, seen)
    return seen, decoder.logits(hidden).float()


@torch.no_grad()
def _check_memory(decoder: Examined, geometry: Geometry, seen: RecordingAttention, name: str) -> None:
    """Raises UnsupportedDecoderError unless a sentence behind a memory gets the logits that the model itself gives it, token
    by token, over a cache that holds the same keys and values."""
    slots, ids = 2, _examined_ids(decoder)[: _EXAMINED[0]]
    shape = (geometry.layers, 2, 1, geometry.kv_heads, slots, geometry.head_dim)
    count = torch.Size(shape).numel()
    memory = torch.linspace(0, 0.37 * count, count, device=decoder.device).sin().view(shape)
    length = torch.tensor([0, len(ids)], dtype=torch.int32, device=decoder.device)
    attention = PackedAttention(memory, "prefix", length, len(ids), position_columns=geometry.position_columns)
    positions = torch.arange(slots, slots + len(ids), device=decoder.device)
    got = decoder.logits(decoder.run(ids, positions, None, attention)).float()
    cache = DynamicCache()
    for layer, (key, value) in enumerate(memory):
        keys, values = seen.widths[layer]
        cache.update(key[..., :keys], value[..., :values], layer)
    switched = decoder.way.attention
    decoder.model.set_attn_implementation("eager")
    given = {cache_argument(decoder.model) or "past_key_values": cache, "use_cache": True}
    steps = [decoder.model(input_ids=one[None, None], **given) for one in ids]
    expected = torch.cat([out.logits[0] for out in steps]).float()
    decoder.model.set_attn_implementation(switched)
    difference = _relative(got, expected)
    if not difference <= _tolerance(geometry):
        raise UnsupportedDecoderError(
            f"{name} takes no notice of position ids, and its own logits behind a memory are others",
            value=f"off by {difference:.2e} of their norm",
            limit=f"{_tolerance(geometry):.1e}",
            remedy=_DECODERS,
        )


def _tolerance(geometry: Geometry) -> float:
    return min(16 * torch.finfo(torch.float32).eps * geometry.layers**0.5, 0.1)


def _examined_ids(decoder: Examined) -> Tensor:
    """Ids that no model takes for padding: RoBERTa leaves padding out of its positions."""
    pad = getattr(decoder.model.config.get_text_config(decoder=True), "pad_token_id", None)
    ids = torch.arange(1, sum(_EXAMINED) + 1, device=decoder.device) * 7 % decoder.vocab_size
    return ids if pad is None else torch.where(ids == pad, (ids + 1) % decoder.vocab_size, ids)


def _check_layers(config: Any, name: str, seen: RecordingAttention) -> None:
    """Raises UnsupportedDecoderError unless every layer came through our attention, alike, and with its window."""
    if not seen.shapes:
        raise UnsupportedDecoderError(f"{name} has attention of its own, which cannot be exchanged", remedy=_DECODERS)
    layers = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)
    if sorted(seen.shapes) != list(range(layers or len(seen.shapes))):
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
        sized = kind != "chunked_attention" or getattr(config, "attention_chunk_size", None)
        if kind not in _LAYER_KINDS or not sized or (kind == "sliding_attention" and seen.windows.get(layer) is None):
            raise UnsupportedDecoderError(
                f"{name}: layer {layer} is of a kind we do not honour",
                value=kind,
                limit=", ".join(_LAYER_KINDS),
                remedy=_DECODERS,
            )


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()
