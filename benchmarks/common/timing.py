"""Timing of sides that are processes of their own: asked in turn, compared round by round."""

from __future__ import annotations

import functools
import statistics
from typing import Any

from benchmarks.common.worker import Worker
from lmvae_fast.profiling.measure import speedup, take_turns

Times = dict[str, list[float]]


def time_request(
    sides: dict[str, Worker], request: str, rounds: int, *, keys: tuple[str, ...] = ("seconds",), **arguments: Any
) -> list[Times]:
    """Figures of ``rounds`` answers of every side, one dictionary per key of an answer; a first answer is not counted."""
    asked = {name: functools.partial(side.ask, request, **arguments) for name, side in sides.items()}
    answers = take_turns(asked, rounds, discarded=1)
    return [{name: [answer[key] for answer in found] for name, found in answers.items()} for key in keys]


def medians(times: Times, digits: int = 4) -> dict[str, float]:
    """Median of each side."""
    return {name: round(statistics.median(values), digits) for name, values in times.items()}


def speedups(times: Times, baselines: dict[str, str], digits: int = 3) -> dict[str, float]:
    """Speed-up of each side over its own baseline."""
    return {name: round(speedup(times, name, baseline), digits) for name, baseline in baselines.items()}
