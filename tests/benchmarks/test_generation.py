"""The decoding benchmark's own arithmetic: what is compared, what a step must read, and tables of what was recorded."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from benchmarks.common import timing
from benchmarks.generation import decode, tables
from benchmarks.generation.our_side import OurSide
from lmvae_fast.integrations.langvae import load_checkpoint

MACHINE = {
    "cpu": "a CPU", "cpu_isa": "avx2", "threads": 2, "torch": "2.13.0", "commit": "0123456789abcdef", "date": "2026-01-01T00"
}  # fmt: skip


class FakeSide:
    """Answers like a process of the benchmark."""

    def __init__(self, seconds: float, ids: list[list[int]]):
        self.seconds, self.ids = seconds, ids

    def ask(self, request: str, **_: object) -> dict[str, Any]:
        return {"ids": self.ids} if request == "ids" else {"seconds": self.seconds, "cpu_seconds": 2 * self.seconds}


CASE = {"weights": 10**6, "head": 0}


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Of the rounds of a measurement, in turn: the machine's speed changes."""
    found = itertools.cycle((1e9, 2e9, 1e9))
    monkeypatch.setattr(
        timing, "machine_limits",
        lambda *_: {
            "copy_bytes_per_s": next(found), "matmul_float32_flops_per_s": 1e12, "matmul_bfloat16_flops_per_s": 1e12
        },
    )  # fmt: skip


def test_sides_take_turns_and_are_compared():
    sides = {"engine fp32": FakeSide(0.5, [[1, 2]]), "eager fp32": FakeSide(1.0, [[1, 2]])}
    row = decode.measure(sides, "eager", 4, 3, CASE)
    # the middle one of shares by the limits of each round: one is discarded, the others had 2, 1 and 1 GB/s
    assert row["share_of_limit"] == {"engine fp32": 0.256} and row["limits"]["copy_bytes_per_s"] == 1e9
    assert row["speedup"] == {"engine fp32": 2.0} and row["cpu_speedup"] == {"engine fp32": 2.0}
    assert row["sentences_per_second"] == {"engine fp32": 8.0, "eager fp32": 4.0}
    assert row["first_token_seconds"] == {"engine fp32": 0.5, "eager fp32": 1.0}
    sides["eager fp32"].ids = [[1, 3]]
    with pytest.raises(SystemExit, match="nothing is timed"):
        decode.measure(sides, "eager", 1, 3, CASE)


def test_every_fp32_side_of_a_body_is_compared():
    sides = {name: FakeSide(1.0, [[1]]) for name in decode.SIDES["body"]}
    sides["compiled bf16"].ids = [[7]]  # its tokens may differ
    row = decode.measure(sides, "body", 1, 1, CASE)
    assert set(row["same_tokens_fp32"]) == {"packed fp32", "plain fp32", "compiled fp32"}
    sides["compiled fp32"].ids = [[7]]
    with pytest.raises(SystemExit, match="compiled fp32"):
        decode.measure(sides, "body", 1, 1, CASE)


@pytest.mark.parametrize("shape", ["tiny", "tiny-llama"])
def test_what_a_step_reads(tmp_path, shape):
    file, case = decode.prepare(tmp_path, shape, 2, 1)
    model = load_checkpoint(case["checkpoint"])
    decoder = model.decoder
    maps = [m.weight for m in decoder.body.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert case["weights"] == sum(w.numel() for w in maps) + decoder.head_weight.numel()
    assert case["head"] == decoder.head_weight.numel()
    sides = [OurSide(json.loads(file.read_text()), "fp32", form) for form in ("engine", "plain", "eager")]
    first, *others = [side._decode(2, 5) for side in sides]
    assert all(other == first for other in others)
    assert [len(ids) for ids in first] == [5, 5]
    ours, theirs = (
        OurSide(json.loads(file.read_text()), "fp32", form, "prefix")._decode(2, 5)
        for form in ("engine", "transformers")
    )
    assert ours == theirs


def test_the_limit_is_bytes_or_products():
    limits = {
        "copy_bytes_per_s": 1e9, "matmul_float32_flops_per_s": 1e10, "matmul_bfloat16_flops_per_s": 4e10
    }  # fmt: skip
    row = {"seconds": {"engine fp32": 1.0, "plain fp32": 1.0, "engine bf16": 1.0, "LangVAE": 9.0}, "batch": 1}
    million, half = 10**6, 500_000  # weights, those of the head among them
    shares = decode.limit_share(row, million, half, limits)
    # bytes: of the engine's fp32 step, the head's in bf16
    assert shares == {
        "engine fp32": pytest.approx(32 * 3e-3), "plain fp32": pytest.approx(32 * 4e-3),
        "engine bf16": pytest.approx(32 * 2e-3),
    }  # fmt: skip
    many = decode.limit_share({**row, "batch": 100}, million, half, limits)
    assert many["plain fp32"] == pytest.approx(32 * 2e-2)
    assert many["engine fp32"] == pytest.approx(32 * (1e-2 + 0.25e-2))


def _record(against: str, shape: str, peaks: bool) -> dict[str, Any]:
    pairs = decode.BASELINES[against]
    sides = list(dict.fromkeys([*pairs, *pairs.values()]))
    row = {
        "batch": 8, "baseline": pairs, "speedup": dict.fromkeys(pairs, 2.0), "cpu_speedup": dict.fromkeys(pairs, 1.5),
        "sentences_per_second": dict.fromkeys(sides, 3.25), "share_of_limit": dict.fromkeys(pairs, 0.5),
        "first_token_seconds": {side: 0.02 for side in sides if side != "LangVAE"},
    }  # fmt: skip
    if peaks:
        row["peak_bytes"] = dict.fromkeys(sides, 2 * 10**9)
    return {"command": f"decode {against}", "shape": shape, "tokens": 32, "machine": MACHINE, "rows": [row]} | (
        {} if peaks else {"peak_bytes": dict.fromkeys(sides, 10**9)}
    )


def test_tables_show_what_was_recorded(tmp_path, monkeypatch):
    folder = tmp_path / "generation"
    folder.mkdir()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.common.records.RESULTS", tmp_path)
    assert "not measured" in tables.generation()
    assert tables.body() == "Not measured."
    for name, record in {
        "langvae": _record("langvae", "gpt2-small", False), "eager-llama-160m": _record("eager", "llama-160m", True),
        "body": _record("body", "gpt2-small", True),
    }.items():  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(record))
    table = tables.generation()
    figures = "3.25 | 3.25 (LangVAE) | 2.00 | 1.50 | 50% | 20 / - | 1.00 / 1.00 |"
    assert f"| LangVAE 0.6.13 | gpt2-small | 8 | engine fp32 | {figures}" in table
    assert "| eager reference | llama-160m | 8 | engine fp32 | 3.25 | 3.25 (eager fp32)" in table
    assert "| 20 / 20 | 2.00 / 2.00 |" in table
    assert "| transformers.generate | | | not measured |" in table
    assert "| gpt2-small | 8 | fp32 | 3.25 | 3.25 | 3.25 | 2.00 | 2.00 | 50% |" in tables.body()
