"""Timing of sides that are processes of their own: asked in turn, compared round by round."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.common.worker import Worker
from lmvae_fast.profiling.measure import machine_limits, speedup, take_turns

Times = dict[str, list[float]]
_LIMITS = "limits of the machine"


def time_request(
    sides: dict[str, Worker], request: str, rounds: int, *, keys: tuple[str, ...] = ("seconds",), **arguments: Any
) -> list[Times]:
    """Figures of ``rounds`` answers of every side, one dictionary per key of an answer; a first answer is not counted."""
    asked = {name: functools.partial(side.ask, request, **arguments) for name, side in sides.items()}
    answers = take_turns(asked, rounds, discarded=1)
    return [{name: [answer[key] for answer in found] for name, found in answers.items()} for key in keys]


def time_request_and_limits(
    sides: dict[str, Worker], request: str, rounds: int, *, keys: tuple[str, ...] = ("seconds",), **arguments: Any
) -> tuple[list[Times], list[dict[str, float]]]:
    """`time_request`, and the machine's limits, measured in every round by this process as one more side: what shares the
    machine comes and goes, so that limits of another minute would be those of another machine."""
    asked: dict[str, Callable[[], Any]] = {
        name: functools.partial(side.ask, request, **arguments) for name, side in sides.items()
    }
    answers = take_turns({**asked, _LIMITS: functools.partial(machine_limits, "cpu", 0.1)}, rounds, discarded=1)
    limits = answers.pop(_LIMITS)
    return [{name: [answer[key] for answer in found] for name, found in answers.items()} for key in keys], limits


def median_limits(limits: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of every round's, the median of each."""
    return {name: statistics.median(one[name] for one in limits) for name in limits[0]}


def medians(times: Times, digits: int = 4) -> dict[str, float]:
    """Median of each side."""
    return {name: round(statistics.median(values), digits) for name, values in times.items()}


def speedups(times: Times, baselines: dict[str, str], digits: int = 3) -> dict[str, float]:
    """Speed-up of each side over its own baseline."""
    return {name: round(speedup(times, name, baseline), digits) for name, baseline in baselines.items()}
