"""Decode steps as recordings: batch sizes that are recorded, and recordings that outlive the call that made them.

A recording costs tens of milliseconds, a short text hardly more than ten: so the rows that one was made over are kept when a
call ends, and the next call of the same kind decodes in them.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lmvae_fast.config import GenerationConfig
from lmvae_fast.models.decoder.decoder import WHEN_MOVED
from lmvae_fast.models.decoder.recorded_step import PLAIN_STEPS, RecordedStep, baked_in, capture_for
from lmvae_fast.models.injection import Injection

__all__ = ["PLAIN_STEPS", "RecordedStep", "capture_for", "keep", "kept", "kind_of", "rows_of"]

LEAST_ROWS = 8  # below it a step takes a GPU no less time
MOST_KEPT = 4  # of one decoder: each holds a cache of keys and values

_kept: WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = WeakKeyDictionary()
WHEN_MOVED.append(lambda decoder: _kept.pop(decoder, None))


def rows_of(sentences: int) -> int:
    """Rows of the batch that so many sentences shrink into: powers of two, so that few sizes are recorded."""
    return max(LEAST_ROWS, 1 << max(sentences - 1, 0).bit_length())


def kind_of(
    decoder: nn.Module,
    kind: Injection,
    size: int,
    limit: int,
    longest_prompt: int,
    config: GenerationConfig,
    end_token: int,
) -> Hashable:
    """What rows must have in common to serve another call: all but the latents, the prompts and the seed."""
    parts = (kind.memory, kind.embedding_shift, kind.output_residual)
    shapes = tuple(None if x is None else (tuple(x.shape), x.dtype) for x in parts)
    sizes = (size, limit, longest_prompt, end_token)
    return (kind.visibility, shapes, sizes, config.replace(seed=None), baked_in(decoder))


def kept(decoder: nn.Module, key: Hashable) -> Any:
    """Rows that an earlier call left, or None: taken out, so that no other call has them."""
    return _kept.get(decoder, {}).pop(key, None)


def keep(decoder: nn.Module, key: Hashable, rows: Any) -> None:
    """Leave rows that no sentence is in for a later call; the oldest of too many are let go."""
    mine = _kept.setdefault(decoder, {})
    mine[key] = rows
    while len(mine) > MOST_KEPT:
        del mine[next(iter(mine))]
