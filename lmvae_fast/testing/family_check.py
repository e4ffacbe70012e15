"""One decoder against its own eager code, token by token: every visibility, generation and gradients, past its limits.

The oracle is the Hugging Face model alone: it reads one token at a time over a plain cache whose entries are arranged as the
visibility says (`reference/stepwise.py`), at positions that it counts itself and, where it takes them, at explicit ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from lmvae_fast.errors import LMVAEError, UnsupportedDecoderError
from lmvae_fast.kernels.latent_attention.visibility import VISIBILITIES, visibility_mask
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.decoder.way import cache_argument, takes
from lmvae_fast.models.injection import Injection
from lmvae_fast.reference.stepwise import past_entries, token_position
from lmvae_fast.testing.parts import tiny_tokenizer
from lmvae_fast.text.batch import pack
from lmvae_fast.text.tokenizer import SentenceTokenizer

TOLERANCE = 1e-5  # relative to the norm, of float32
TOKENS, PREFIX_SLOTS, BATCH = 9, 3, 2  # past a window of 4 under every rule
LONGEST = 64  # tokens of a sentence that is read one by one to a decoder's last position


def check_decoder(model: PreTrainedModel, *, gradients: bool = True) -> dict[str, float | str]:
    """Differences by what was computed, relative to the norm; a string where a case is refused, and why.

    Keys: ``no_memory``, each visibility, ``positions`` (explicit ones, prefix), ``generation`` (logits along greedy tokens,
    infinite where a token differs), ``gradients`` (of the memory, the worst visibility), ``last`` (a sentence that ends at
    the decoder's last position, where it has one) and ``limit``, how many it has.

    Raises:
        UnsupportedDecoderError: the decoder is refused.
    """
    decoder = Decoder(model, SentenceTokenizer(tiny_tokenizer()))
    found: dict[str, float | str] = {}
    ids, worst = _ids(decoder), 0.0
    try:
        decoder.check_positions(0, TOKENS, "prefix")
        found["no_memory"] = _relative(_ours(decoder, ids, None, "prefix"), _own(decoder, ids, None, "prefix"))
    except LMVAEError as error:
        found["no_memory"] = f"refused: {error.problem}; allowed: {error.limit}"
    for visibility in VISIBILITIES:
        memory = _memory(decoder, visibility)
        try:
            decoder.check_positions(memory.shape[-2], TOKENS, visibility)
        except LMVAEError as error:
            found[visibility] = f"refused: {error.problem}; allowed: {error.limit}"
            continue
        memory.requires_grad_(gradients)
        ours, own = _ours(decoder, ids, memory, visibility), _own(decoder, ids, memory, visibility)
        found[visibility] = _relative(ours.detach(), own.detach())
        if gradients:
            weights = torch.linspace(-1, 1, ours.numel()).view_as(ours)
            got, want = (torch.autograd.grad((x * weights).sum(), memory)[0] for x in (ours, own))
            worst = max(worst, _relative(_used(decoder, got), _used(decoder, want)))
            if not float(_used(decoder, want).abs().max()) > 0:
                worst = float("inf")
    if gradients:
        found["gradients"] = worst
    if isinstance(found["prefix"], str):
        return found
    memory = _memory(decoder, "prefix")
    if takes(model, "position_ids") and decoder.way.takes_positions and _caches_what_it_reads(decoder):
        own = _own(decoder, ids, memory, "prefix", explicit=True)
        found["positions"] = _relative(_ours(decoder, ids, memory, "prefix"), own)
    found["generation"] = _generation(decoder, ids[:, 0], memory)
    found |= _limit(decoder, memory)
    return found


def wrong(found: dict[str, float | str]) -> list[str]:
    """What of the figures of `check_decoder` is off by more than rounding."""
    return [name for name, value in found.items() if not isinstance(value, str) and not value <= TOLERANCE]


def _ids(decoder: Decoder) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, decoder.vocab_size, (BATCH, TOKENS), generator=generator)


def _memory(decoder: Decoder, visibility: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    slots = PREFIX_SLOTS if visibility == "prefix" else TOKENS + 1
    shape = (decoder.num_layers, 2, BATCH, decoder.kv_heads, slots, decoder.head_dim)
    return torch.randn(shape, generator=generator).to(decoder.dtype)


def _ours(decoder: Decoder, ids: Tensor, memory: Tensor | None, visibility: str) -> Tensor:
    """Logits ``[batch, tokens, vocabulary]`` of the packed pass, sentences of two lengths; what lacks is cut from both."""
    packed: dict[str, Any] = dict(pack(ids.tolist(), ids.tolist()))
    injection = None if memory is None else Injection(visibility, memory)
    hidden = decoder.hidden(
        packed["input_ids"], injection, cu_seqlens=packed["cu_seqlens"], max_seqlen=packed["max_seqlen"],
        rows=packed["rows"], token_index=packed["token_index"],
    )  # fmt: skip
    return decoder.logits(hidden).view(*ids.shape, -1)


def _own(decoder: Decoder, ids: Tensor, memory: Tensor | None, visibility: str, explicit: bool = False) -> Tensor:
    if cache_argument(decoder.model) is None:
        return uncached_logits(decoder, ids, memory, visibility)
    if not _caches_what_it_reads(decoder):
        return masked_logits(decoder, ids, memory, visibility)
    reader = OwnCache(decoder, memory, visibility, explicit)
    with eager(decoder):
        return torch.stack([reader.read(ids[:, step]) for step in range(ids.shape[1])], dim=1)


class OwnCache:
    """The model's own forward on one token per sentence, over a plain cache arranged by hand."""

    def __init__(self, decoder: Decoder, memory: Tensor | None, visibility: str, explicit: bool = False):
        self.decoder, self.visibility, self.explicit, self.step = decoder, visibility, explicit, 0
        self.slots = 0 if memory is None else memory.shape[-2]
        self.memory = [] if memory is None else [_cut(decoder, layer) for layer in memory.unbind(0)]
        self.tokens: list[tuple[Tensor, Tensor]] = []

    def read(self, ids: Tensor) -> Tensor:
        """Logits ``[batch, vocabulary]`` after the next token, int64 ``[batch]``."""
        cache = DynamicCache()
        for layer in range(self.decoder.num_layers):
            keys, values = (self._past(layer, part) for part in (0, 1))
            if keys is not None and keys.shape[2]:
                cache.update(keys, values, layer)
        options: dict[str, Any] = {}
        if self.explicit:
            position = token_position(self.visibility, self.step, self.slots) + self.decoder.position_offset
            options["position_ids"] = torch.full((len(ids), 1), position)
        options[cache_argument(self.decoder.model) or "past_key_values"] = cache
        out = self.decoder.model(input_ids=ids[:, None], use_cache=True, **options)
        new = [(layer.keys[:, :, -1:], layer.values[:, :, -1:]) for layer in _layers(cache)]
        if self.tokens and self.visibility != "rolling":
            pairs = zip(self.tokens, new, strict=True)
            new = [(torch.cat([k, dk], 2), torch.cat([v, dv], 2)) for (k, v), (dk, dv) in pairs]
        self.tokens, self.step = new, self.step + 1
        return out.logits[:, -1].float()

    def _past(self, layer: int, part: int) -> Any:
        tokens = self.tokens[layer][part] if self.tokens else None
        if not self.memory:
            return tokens
        slots = self.memory[layer][part]
        return past_entries(self.visibility, self.step, slots, slots[:, :, :0] if tokens is None else tokens)


def _layers(cache: DynamicCache) -> list[Any]:
    return list(cache.layers)


def _cut(decoder: Decoder, layer: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer's memory as the model itself would hold them."""
    keys, values = decoder.widths
    return layer[0, ..., :keys], layer[1, ..., :values]


def _used(decoder: Decoder, gradient: Tensor) -> Tensor:
    keys, values = decoder.widths
    return torch.cat([gradient[:, 0, ..., :keys].flatten(), gradient[:, 1, ..., :values].flatten()])


@torch.no_grad()
def _caches_what_it_reads(decoder: Decoder) -> bool:
    """Whether the model's own cache holds the keys and values of its attention, rather than what they are made of (MLA)."""
    name = cache_argument(decoder.model)
    if name is None:
        return False
    cache = DynamicCache()
    with eager(decoder):
        decoder.model(input_ids=_ids(decoder)[:, :1], use_cache=True, **{name: cache})
    found = {(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in _layers(cache)}
    return found == {(decoder.kv_heads, *decoder.widths)}


def masked_logits(decoder: Decoder, ids: Tensor, memory: Tensor | None, visibility: str) -> Tensor:
    """Logits ``[batch, tokens, vocabulary]`` of the model's own eager attention over slots and tokens under one mask.

    The other oracle, for models whose cache cannot be given keys: each layer's eager function gets the slots before its own
    keys and the visibility as an additive mask.
    """
    model, tokens = decoder.model, ids.shape[1]
    slots = 0 if memory is None else memory.shape[-2]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if memory is not None:
            keys, values = _cut(decoder, memory[module.layer_idx])
            key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        window = options.get("sliding_window")
        visible = visibility_mask(tokens, slots, visibility if slots else "prefix", window)
        mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
        own = sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, mask[None, None], **options)

    AttentionInterface.register("lmvae_oracle", attention)
    positions = _positions(visibility, tokens, slots)
    model.set_attn_implementation("lmvae_oracle")
    try:
        return model(input_ids=ids, position_ids=positions.expand(len(ids), -1), use_cache=False).logits.float()
    finally:
        model.set_attn_implementation(decoder.way.attention)


def _positions(visibility: str, tokens: int, slots: int) -> Tensor:
    steps = [token_position(visibility, step, slots) if slots else step for step in range(tokens)]
    return torch.tensor(steps)


def uncached_logits(decoder: Decoder, ids: Tensor, memory: Tensor | None, visibility: str) -> Tensor:
    """As `masked_logits`, for a model without a cache and without a registry of attention functions: the first GPT."""
    tokens, slots = ids.shape[1], 0 if memory is None else memory.shape[-2]
    visible = visibility_mask(tokens, slots, visibility if slots else "prefix", None)

    def attention(layer: int) -> Any:
        def softmax(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> list[Tensor]:
            key = key.transpose(2, 3)
            if memory is not None:
                key, value = torch.cat([memory[layer, 0], key], 2), torch.cat([memory[layer, 1], value], 2)
            scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
            return [scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value]

        return softmax

    modules = [module for module in decoder.body.modules() if type(module).__name__ == "Attention"]
    ours = [module.__dict__.pop("_attn") for module in modules]
    for layer, module in enumerate(modules):
        module.__dict__["_attn"] = attention(layer)
    try:
        positions = _positions(visibility, tokens, slots)
        return decoder.model(input_ids=ids, position_ids=positions.expand(len(ids), -1)).logits.float()
    finally:
        for module, own in zip(modules, ours, strict=True):
            module.__dict__["_attn"] = own


@torch.no_grad()
def _generation(decoder: Decoder, start: Tensor, memory: Tensor) -> float:
    injection = Injection("prefix", memory)
    cache = decoder.new_cache(injection, batch=len(start), max_tokens=TOKENS)
    cache.place(torch.arange(len(start)), injection)
    reader, worst = OwnCache(decoder, memory, "prefix") if _caches_what_it_reads(decoder) else None, 0.0
    current, read = start, start.unsqueeze(1)
    for _ in range(TOKENS):
        logits = decoder.step(current, cache, injection).float()
        if reader is None:
            own = _own(decoder, read, memory, "prefix")[:, -1]
        else:
            with eager(decoder):
                own = reader.read(current)
        worst = max(worst, _relative(logits, own))
        if not torch.equal(logits.argmax(-1), own.argmax(-1)):
            return float("inf")
        current = own.argmax(-1)
        read = torch.cat([read, current.unsqueeze(1)], dim=1)
    return worst


@torch.no_grad()
def _limit(decoder: Decoder, memory: Tensor) -> dict[str, float | str]:
    """That the decoder's last position is right, and that what lies past it is refused."""
    positions = decoder.max_positions
    if positions is None:
        return {"limit": "none"}
    found: dict[str, float | str] = {"limit": str(positions)}
    tokens = positions - PREFIX_SLOTS
    if decoder.hidden_window is None and TOKENS < tokens <= LONGEST:
        ids = torch.arange(BATCH * tokens).mul(7).remainder(decoder.vocab_size - 4).add(4).view(BATCH, tokens)
        found["last"] = _relative(_ours(decoder, ids, memory, "prefix"), _own(decoder, ids, memory, "prefix"))
    try:
        decoder.check_positions(PREFIX_SLOTS, tokens + 1, "prefix")
    except LMVAEError:
        return found
    raise UnsupportedDecoderError("positions past the decoder's are not refused", value=positions)


@contextmanager
def eager(decoder: Decoder) -> Iterator[None]:
    """Inside, the model runs its own eager attention."""
    decoder.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.model.set_attn_implementation(decoder.way.attention)


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()
