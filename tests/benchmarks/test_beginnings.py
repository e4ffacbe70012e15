"""The benchmark of beginning a batch: the same work on both sides, its arithmetic, and its table."""

from __future__ import annotations

import pytest
import torch

import benchmarks.generation.beginnings as beginnings
from benchmarks.generation import tables
from lmvae_fast.testing import make_model


@pytest.mark.parametrize("visibility", ["rolling", "prefix"])
def test_both_sides_leave_the_same_or_nothing_is_timed(monkeypatch, visibility):
    class Side:
        def __init__(self, case, precision, form, visibility):
            self.model = make_model("gpt2", visibility=visibility, slots=9).eval()
            self.z = torch.randn(5, 6)

    monkeypatch.setattr(beginnings, "OurSide", Side)
    real = torch.randint
    monkeypatch.setattr(torch, "randint", lambda low, high, *rest, **options: real(3, 90, *rest, **options))
    work = beginnings.sides({}, visibility, "fp32", 4, 5)
    assert {name: set(pair) for name, pair in work.items()} == {
        name: {"ours", "plain"} for name in ("memory", "prompt")
    }
    assert beginnings.measure(work["prompt"], 2)["seconds"]["plain"] > 0
    monkeypatch.setattr(beginnings, "read", lambda *arguments: None)
    with pytest.raises(SystemExit, match="prompt"):
        beginnings.sides({}, visibility, "fp32", 4, 5)


def test_ratios_are_of_turns_and_the_table_has_them(monkeypatch):
    now = {"elapsed": 0.0, "processor": 0.0}

    def work(elapsed: float):
        def run() -> None:
            now["elapsed"] += elapsed
            now["processor"] += 1.0

        return run

    monkeypatch.setattr(beginnings.time, "perf_counter", lambda: now["elapsed"])
    monkeypatch.setattr(beginnings.time, "process_time", lambda: now["processor"])
    row = beginnings.measure({"ours": work(1.0), "plain": work(3.0)}, 3)
    assert row["speedup"] == 3.0 and row["cpu_speedup"] == 1.0
    machine = {
        "cpu": "a CPU",
        "cpu_isa": "avx2",
        "threads": 2,
        "torch": "2",
        "commit": "0123456789ab",
        "date": "2026-01-01T",
    }
    record = {
        "command": "c", "shape": "s", "batch": 4, "prompt": 5, "machine": machine,
        "rows": [{"what": "prompt", "visibility": "prefix", "precision": "fp32", **row}],
    }  # fmt: skip
    monkeypatch.setattr(tables, "load", lambda name: record)
    assert "| prompt of 5 tokens in one pass | token by token | prefix | fp32 | 3.00 | 1.00 |" in tables.beginnings()
