"""Paired bootstrap: is the difference of two models' figures more than the choice of sentences?

Source: Efron & Tibshirani 1993; for figures of texts Koehn 2004. Both models see the same resamples: these depend on the
number of rows and the seed alone, so figures computed at different times can still be paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmvae_fast.errors import DataError
from lmvae_fast.memory import check_memory
from lmvae_fast.probes import checks
from lmvae_fast.probes.results import Array, plain

RESAMPLES = 200


def resamples(rows: int, number: int = RESAMPLES, seed: int = 0) -> Iterator[Array]:
    """``number`` times ``rows`` indices drawn with replacement; the same for the same three numbers."""
    checks.whole("rows", rows, 1)
    source = np.random.default_rng([checks.whole("seed", seed, 0), rows])
    for _ in range(number):
        yield source.integers(rows, size=rows)


def replicates(statistic: Callable[[Array], float], rows: int, *, number: int = RESAMPLES, seed: int = 0) -> Array:
    """The statistic of each resample's row indices: float64 ``[number]``."""
    check_memory(f"{number:,} resamples", "lower resamples", 40 * number)
    return np.array([statistic(chosen) for chosen in resamples(rows, number, seed)], dtype=np.float64)


def replicates_of_mean(items: Any, *, number: int = RESAMPLES, seed: int = 0) -> Array:
    """The mean of each resample of per-row figures ``[N]``; rows that are NaN count in none."""
    items = np.asarray(items, dtype=np.float64)
    return replicates(lambda chosen: float(np.nanmean(items[chosen])), len(items), number=number, seed=seed)


@dataclass(frozen=True)
class Difference:
    """Second model minus first.

    Attributes:
        first, second: the figures. value: their difference.
        low, high: 95 % interval of the difference over resamples (percentiles).
        p: twice the share of resamples in which the difference has the other sign, at least 1 / resamples, at most 1.
        resamples: how many.
    """

    first: float
    second: float
    value: float
    low: float
    high: float
    p: float
    resamples: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0.0 or self.high < 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with ``clear``."""
        return plain({**self.__dict__, "clear": self.clear})


def paired_difference(first: float, second: float, first_replicates: Any, second_replicates: Any) -> Difference:
    """Compare two figures by their replicates over the same resamples; raises DataError where these do not pair."""
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (first_replicates, second_replicates))
    if ours.shape != theirs.shape or ours.ndim != 1 or len(ours) < 2:
        raise DataError(
            "replicates must come from the same resamples", value=f"{list(ours.shape)} and {list(theirs.shape)}",
            remedy="probe both models with the same number of resamples",
        )  # fmt: skip
    gaps = theirs - ours
    gaps = gaps[np.isfinite(gaps)]
    if not len(gaps):
        raise DataError("no resample has both figures", value=len(ours))
    low, high = np.percentile(gaps, [2.5, 97.5])
    p = 2.0 * min(float(np.mean(gaps <= 0.0)), float(np.mean(gaps >= 0.0)))
    return Difference(
        float(first), float(second), float(second - first), float(low), float(high),
        float(min(1.0, max(p, 1.0 / len(gaps)))), len(gaps),
    )  # fmt: skip
