"""Random choices that are the same on every platform and every Python version.

Of the ``random`` module only ``Random(int_seed).random()`` has a guaranteed sequence; ``shuffle``, ``sample`` and
``randrange`` may change between versions. So everything here is built from ``random()`` alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from lmvae_fast.errors import DataError

T = TypeVar("T")


def generator(seed: int) -> random.Random:
    """A generator for a non-negative integer seed."""
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        # A negative seed would be the same as its absolute value.
        raise DataError("seed is out of range", value=repr(seed), limit="an integer >= 0")
    return random.Random(seed)


def below(source: random.Random, bound: int) -> int:
    """An integer in [0, bound), bound <= 2^53 (53 random bits times bound, rounded down)."""
    # random() is k / 2^53: recover k and stay in integers, so that no rounding of a product can reach bound.
    return int(source.random() * 9007199254740992.0) * bound >> 53


def shuffled(items: Sequence[T], seed: int | random.Random) -> list[T]:
    """A random order of the items (Fisher-Yates)."""
    source = seed if isinstance(seed, random.Random) else generator(seed)
    result = list(items)
    for last in range(len(result) - 1, 0, -1):
        other = below(source, last + 1)
        result[last], result[other] = result[other], result[last]
    return result


def distinct_below(source: random.Random, bound: int, count: int) -> list[int]:
    """``count`` distinct integers of [0, bound), in random order; time and memory grow with ``count`` only."""
    if count > bound:
        raise ValueError(f"cannot draw {count} distinct integers below {bound}")
    # Fisher-Yates from the front on a list 0..bound-1 of which only the moved entries are stored.
    moved: dict[int, int] = {}
    drawn = []
    for first in range(count):
        other = first + below(source, bound - first)
        drawn.append(moved.get(other, other))
        moved[other] = moved.get(first, first)
    return drawn
