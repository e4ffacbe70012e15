"""The table of README.md: eight figures, each chosen by a fixed rule from the records (GPT-2 small, batch 32)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.common.records import load, where

SHAPE, BATCH = "gpt2-small", 32
# (work, record, side, against, how the two sides were found equal before they were timed)
STEPS = (
    ("training step, LangVAE's own objective", "langvae", "free-running fp32", "LangVAE 0.6.13", "loss and gradients"),
    (
        "training step, teacher forcing",
        "langvae",
        "teacher-forced fp32",
        "LangVAE 0.6.13",
        "no: another objective",
    ),
    (
        "training step, teacher forcing, bf16",
        "langvae",
        "teacher-forced bf16",
        "LangVAE 0.6.13",
        "no: another objective, bf16",
    ),
    (
        "training step, teacher forcing",
        "eager",
        "teacher-forced fp32",
        "the same pass in plain torch",
        "loss and gradients",
    ),
)
DECODING = (
    ("decoding", "langvae", "engine fp32", "LangVAE 0.6.13", "every token"),
    ("decoding, bf16", "langvae", "engine bf16", "LangVAE 0.6.13", "no: bf16 beside its fp32"),
    ("decoding", "transformers", "engine fp32", "transformers.generate", "every token"),
)
FLOW = "AllInOneBlock inverse, batch 1"


def highlights() -> str:
    """Eight lines: work, baseline, times faster, what was compared."""
    lines = ["| work | against | times faster | found equal before timing |", "|---|---|---|---|"]
    for work, record, side, against, equal in STEPS:
        row = _case(load(f"training/steps/{record}.json"), "cases")
        lines.append(_line(work, against, row and row["speedup"][side], equal))
    for work, record, side, against, equal in DECODING:
        row = _case(load(f"generation/{record}.json"), "rows")
        lines.append(_line(work, against, row and row["speedup"][side], equal))
    flow = load("kernels/coupling_flow.json")
    cases = [case for case in flow["cases"] if case["name"] == FLOW] if flow else []
    lines.append(
        _line("coupling flow of 128 channels, inverse, batch 1", "FrEIA", cases and cases[0]["speedup"], "outputs")
    )
    of_steps, of_flow = (
        where(record["machine"]).split(", torch")[0] if record else ""
        for record in (load("training/steps/langvae.json"), flow)
    )
    note = f" {of_steps}." if of_steps else ""
    if of_flow and of_flow != of_steps:
        note += f" The flow: {of_flow}."
    return "\n".join([*lines, "", f"GPT-2 small, batch {BATCH}, fp32 where nothing else is said.{note}"])


def _case(record: dict[str, Any] | None, key: str) -> dict[str, Any] | None:
    """The row of the record at our shape and batch."""
    rows = record[key] if record else []
    return next((row for row in rows if row.get("shape", SHAPE) == SHAPE and row["batch"] == BATCH), None)


def _line(work: str, against: str, factor: Any, equal: str) -> str:
    return f"| {work} | {against} | {f'{factor:.1f}' if factor else 'not measured'} | {equal} |"


TABLES: dict[str, Callable[[], str]] = {"highlights": highlights}
