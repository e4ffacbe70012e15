"""Timing in turn: every side once a round, what is discarded, and ratios within a round."""

from __future__ import annotations

import itertools

import pytest

from lmvae_fast.profiling import measure
from lmvae_fast.profiling.measure import call_seconds, interleave, speedup, take_turns


def test_every_side_has_one_turn_a_round():
    calls: list[str] = []
    sides = {name: (lambda name=name: calls.append(name) or len(calls)) for name in "abc"}
    found = take_turns(sides, 8, discarded=2)
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys("abc", 8)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 10 and all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds[2:]}) > 1  # not always in the same order
    assert min(value for values in found.values() for value in values) == 7  # the first six calls are dropped


def test_rounds_go_on_until_the_time_is_over(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert len(take_turns({"a": lambda: 0}, 2, seconds=10)["a"]) == 11
    assert len(take_turns({"a": lambda: 0}, 2)["a"]) == 2


def test_a_drift_of_the_machine_leaves_the_ratio(monkeypatch):
    now = [0.0]
    slowdown = itertools.cycle([1.0, 10.0, 100.0])

    def machine_slows() -> None:
        nonlocal factor
        factor = next(slowdown)

    factor = 1.0

    def side(seconds: float):
        def run() -> None:
            now[0] += factor * seconds

        return run

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(6):
        machine_slows()
        for name, run in (("ours", side(1.0)), ("theirs", side(3.0))):
            times[name].append(call_seconds(run))
    assert speedup(times, "ours", "theirs") == pytest.approx(3.0)
    assert speedup({"ours": [1, 1, 1], "theirs": [2, 2, 50]}, "ours", "theirs") == 2.0


def test_short_calls_are_timed_in_groups(monkeypatch):
    now, calls = [0.0], [0]

    def short() -> None:
        calls[0] += 1
        now[0] += 1e-4

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    times = interleave({"short": short}, 0.0, "cpu", rounds=3)["short"]
    assert times == pytest.approx([1e-4] * 3)
    assert calls[0] >= 3 * 19  # groups of about 2 ms
