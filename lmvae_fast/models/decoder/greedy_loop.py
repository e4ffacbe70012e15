"""The decoder reading its own greedy output, one token at a time over the static cache, recorded where that can be.

A recording holds addresses, so a loop of a given shape keeps its cache and is run again over other memories. Shapes that come
once are run as they are: only the second loop of a shape is kept and recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lmvae_fast.models.decoder.decoder import WHEN_MOVED, Decoder
from lmvae_fast.models.decoder.exchange import Exchanges, exchanged
from lmvae_fast.models.decoder.prepared_weights import exchanges, fused_layers
from lmvae_fast.models.decoder.recorded_step import RecordedStep, baked_in, capture_for
from lmvae_fast.models.injection import Injection

MOST_KEPT = 4  # loops of one decoder: each holds a cache of keys and values
_SHAPES_REMEMBERED = 256


class GreedyLoop:
    """Buffers of a batch of sentences that are read together, and the step that moves them on.

    Args:
        decoder: it is not held; every call is given it.
        injection: of this kind are those that :meth:`run` takes.
        steps: tokens a sentence.
    """

    def __init__(self, decoder: Decoder, injection: Injection, steps: int):
        batch, device = injection.batch_size, decoder.device
        self.steps = steps
        self.cache = decoder.new_cache(injection, batch=batch, max_tokens=steps)
        parts = (injection.embedding_shift, injection.output_residual)
        self.injection = Injection(
            injection.visibility,
            None if injection.memory is None else self.cache.memory,
            *(None if part is None else torch.empty_like(part) for part in parts),
        )
        self.rows = torch.arange(batch, device=device)
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.place = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.ids = torch.zeros(batch, steps, dtype=torch.int64, device=device)
        self.decoder: Decoder | None = None
        self.recorded: RecordedStep | None = None
        self.layers: Exchanges = []  # of the last run

    def record(self, decoder: Decoder) -> None:
        """Have the step recorded after a few calls, where the device can."""
        capture = capture_for(decoder, decoder.device, None, in_autocast=True)
        if capture is not None:
            state = [self.cache.step, self.cache.finite, self.token, self.place, self.ids]
            self.recorded = RecordedStep(self._advance, state, capture, decoder)

    def run(self, decoder: Decoder, injection: Injection, wanted: list[int] | None = None) -> Tensor:
        """The greedy tokens of these injections, int64 ``[batch, steps]``: the loop's own buffer.

        wanted: tokens of each row, none more than the row before; what a row is not asked for stays 0. The loop has fewer
        rows afterwards, and can be run no more.
        """
        self.cache.place(self.rows, injection)
        for name in ("embedding_shift", "output_residual"):
            if (part := getattr(injection, name)) is not None:
                getattr(self.injection, name).copy_(part)
        self.token.fill_(decoder.tokenizer.bos_token_id)
        self.place.zero_()
        layers = self._layers(decoder)
        if self.recorded is not None:
            if layers is not self.layers and (layers or self.layers):  # recorded over layers that are no more
                self.record(decoder)
            self.recorded.decoder = decoder
        self.layers = layers
        step = self.recorded or self._advance
        self.decoder = decoder
        try:
            with exchanged(layers):
                for place in range(self.steps):
                    if wanted is not None:
                        while wanted and wanted[-1] <= place:
                            wanted.pop()
                        if not wanted:
                            break
                        self._narrow(len(wanted))
                    step()
        finally:
            self.decoder = None
            if self.recorded is not None:
                self.recorded.decoder = None
        return self.ids

    def _layers(self, decoder: Decoder) -> Exchanges:
        """What the steps run over: a loop of a GPU is run first and recorded later, and both go through the same layers."""
        fused = fused_layers(decoder)
        return exchanges(decoder, len(self.rows)) if fused or self.recorded is None else []

    def _narrow(self, rows: int) -> None:
        """Go on with the first rows alone; no buffer is copied."""
        if rows < len(self.token):
            self.cache.narrow(rows)
            self.token, self.place = self.token[:rows], self.place[:rows]
            self.injection = self.injection.select(slice(rows))

    def _advance(self) -> None:
        assert self.decoder is not None
        self.token.copy_(self.decoder.greedy_step(self.token, self.cache, self.injection, pack=self.recorded is None))
        self.ids[: len(self.token)].scatter_(1, self.place, self.token.unsqueeze(1))
        self.place.add_(1)


@dataclass
class _Loops:
    seen: dict[Hashable, None] = field(default_factory=dict)
    kept: dict[Hashable, GreedyLoop] = field(default_factory=dict)


_loops: WeakKeyDictionary[Decoder, _Loops] = WeakKeyDictionary()
WHEN_MOVED.append(lambda decoder: _loops.pop(decoder, None))  # a kept loop holds the layers that it ran over


@contextlib.contextmanager
def _without_idle_autocast(decoder: Decoder) -> Iterator[None]:
    """Turns autocast off where all weights are of its dtype already, as a frozen decoder's are in training: it would change
    nothing that matters, and weights packed for decoding are not for it (prepared_weights.pays)."""
    kind = decoder.device.type
    idle = torch.is_autocast_enabled(kind) and not decoder.trains
    dtype = torch.get_autocast_dtype(kind) if idle else None
    with torch.autocast(kind, enabled=False) if idle and _all_of(decoder, dtype) else contextlib.nullcontext():
        yield


def _all_of(decoder: Decoder, dtype: torch.dtype | None) -> bool:
    return all(weight.dtype == dtype for weight in decoder.model.parameters())


def _plain_ids(decoder: Decoder, injection: Injection, steps: int, wanted: Tensor | None) -> Tensor:
    """By a loop that is not recorded."""
    if wanted is None or decoder.device.type != "cpu":  # reading numbers of a device would wait for it
        return GreedyLoop(decoder, injection, steps).run(decoder, injection)
    order = wanted.argsort(descending=True, stable=True)
    injection, most = injection.select(order), wanted[order].clamp(max=steps).tolist()
    ids = torch.empty(injection.batch_size, steps, dtype=torch.int64)
    ids[order] = GreedyLoop(decoder, injection, steps).run(decoder, injection, most)
    return ids


@torch.no_grad()
def greedy_ids(decoder: Decoder, injection: Injection, steps: int, wanted: Tensor | None = None) -> Tensor:
    """The first ``steps`` greedy tokens of every latent, int64 ``[batch, steps]``; end tokens do not stop it.

    This is how LangVAE decodes, in training and in generation: what follows an end token is kept.

    wanted: int64 ``[batch]``, how many tokens of each row matter; the others are anything. Where the loop is not recorded,
        rows leave it when they have theirs.
    """
    batch, device = injection.batch_size, decoder.device
    if steps == 0 or batch == 0:
        return torch.empty(batch, steps, dtype=torch.int64, device=device)
    with _without_idle_autocast(decoder):
        if capture_for(decoder, device, None, in_autocast=True) is None:
            return _plain_ids(decoder, injection, steps, wanted)
        return _recorded_ids(decoder, injection, steps)


def _recorded_ids(decoder: Decoder, injection: Injection, steps: int) -> Tensor:
    """By a loop that is kept for its shape, and recorded from its second run on."""
    parts = (injection.memory, injection.embedding_shift, injection.output_residual)
    shapes = tuple(None if x is None else (tuple(x.shape), x.dtype) for x in parts)
    key = (steps, injection.visibility, shapes, baked_in(decoder))
    loops = _loops.setdefault(decoder, _Loops())
    loop = loops.kept.pop(key, None)  # out of reach of another thread while it runs
    if loop is None:
        loop = GreedyLoop(decoder, injection, steps)
        if key not in loops.seen:
            loops.seen[key] = None
            while len(loops.seen) > _SHAPES_REMEMBERED:
                del loops.seen[next(iter(loops.seen))]
            return loop.run(decoder, injection)
        loop.record(decoder)
    ids = loop.run(decoder, injection).clone()
    loops.kept[key] = loop
    while len(loops.kept) > MOST_KEPT:
        del loops.kept[next(iter(loops.kept))]
    return ids
