"""Table of whole steps of the further systems, from benchmarks/results/training/{cvae,llamavae,adapters,flow}.json and
generation/{one_to_many,int8-*}.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.records import RESULTS, load, where
from benchmarks.makes import MAKES


def _line(work: str, case: str, against: str, factor: float | str, memory: str, goal: str) -> str:
    shown = factor if isinstance(factor, str) else f"{factor:.2f}"
    return f"| {work} | {case} | {against} | {shown} | {memory} | {goal} |"


def _memory(peaks: dict[str, int], ours: str, theirs: str) -> str:
    return f"{peaks[ours] / 1e9:.2f} / {peaks[theirs] / 1e9:.2f} GB" if ours in peaks and theirs in peaks else ""


def _steps(title: str, record: dict[str, Any]) -> Iterator[str]:
    """Rows of a comparison of training steps, every side against the one whose speed-up is not listed."""
    for row in record["results"]:
        baseline = next(name for name in row["milliseconds"] if name not in row["speedup"])
        case = f"{row['shape']}, {row['tokens']:,} tokens"
        goal = row.get("floor", {})
        asked = f"{goal['speedup']}x, {goal['peak_memory']:.0%} of the memory" if goal else ""
        for side, factor in row["speedup"].items():
            yield _line(f"{title}, {side}", case, baseline, factor, _memory(row["peak_bytes"], side, baseline), asked)


def _adapters(title: str, record: dict[str, Any]) -> Iterator[str]:
    for row in record["results"]:
        case = f"{row['shape']}, {row['tokens']:,} tokens, rank {row['rank']}"
        for side, factor in row["speedup"].items():
            plain = side.replace("prepared layers", "modules")
            yield _line(f"{title}, {side}", case, plain, factor, _memory(row["peak_bytes"], side, plain), "")


def _flow(title: str, record: dict[str, Any]) -> Iterator[str]:
    for row in record["results"]:
        case = f"{row['kind']}, {row['blocks']} blocks of {row['hidden']}, {row['dim']} channels, batch {row['batch']}"
        yield _line(title, case, "FrEIA + AdamW(fused)", row["speedup"], "", "2x")


def _one_to_many(title: str, record: dict[str, Any]) -> Iterator[str]:
    for row in record["results"]:
        case = f"{row['shape']}, {row['samples']} responses of {row['prompts']} prompts, batches of {row['rows']}"
        memory = _memory(row["peak_bytes"], "ours", row["baseline"])
        yield _line(title, case, row["baseline"], row["speedup"], memory, f"{row['floor']}x")


def systems() -> str:
    """Speed of CVAE, LlaMaVAE, the flow and one-to-many sampling, each against its baseline in the same run."""
    lines = [
        "| work | case | against | times faster | peak memory, ours / theirs | goal |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for name, title, rows in (
        ("training/cvae", "CVAE's step of stage 2", _steps),
        ("training/llamavae", "LlaMaVAE's step", _steps),
        ("training/adapters", "our preset's step", _adapters),
        ("training/flow", "flow's step with AdamW", _flow),
        ("generation/one_to_many", "one-to-many sampling", _one_to_many),
        ("generation/one_to_many-batch-64", "one-to-many sampling", _one_to_many),
    ):
        by_make = {make: record for make in MAKES if (record := load(str(Path(make, f"{name}.json"))))}
        if not by_make:
            lines.append(_line(title, "", "", "not measured", "", ""))
        for make, record in by_make.items():
            lines += rows(f"{title} ({MAKES[make].split(',')[0]})", record)
            notes.append(f"- `{record['command']}` ({where(record['machine'])})")
    return "\n".join([*lines, "", *notes])


def int8() -> str:
    """What int8 weights change of a pretrained decoder's predictions."""
    files = sorted((RESULTS / "generation").glob("int8-*.json"))
    if not files:
        return "Not measured."
    lines = [
        "| decoder | beside | tokens | NLL, nats a token | change with int8 | most probable token the same |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for file in files:
        record = load(f"generation/{file.name}") or {}
        for dtype, row in record["rows"].items():
            change = f"{row['change']:+.4f} ± {row['change_standard_error']:.4f}"
            same = f"{row['same_most_probable']:.1%}"
            lines.append(
                f"| {record['decoder']} | {dtype} | {row['tokens']:,} | {row['nll']:.3f} | {change} | {same} |"
            )
        notes.append(f"- `{record['command'].strip()}` ({where(record['machine'])})")
    return "\n".join([*lines, "", *notes])


def commits() -> str:
    """Tables of the comparisons of two commits (benchmarks/commits.py), one for every record."""
    files = [*sorted(RESULTS.glob("commits*.json")), *sorted(RESULTS.glob("*/commits*.json"))]
    records = [load(str(file.relative_to(RESULTS))) for file in files]
    return "\n\n".join(_compared(record) for record in records if record is not None) or "Not measured."


def _compared(record: dict[str, Any]) -> str:
    this, other = record["commits"]["this"], record["commits"]["other"]
    lines = [
        f"| work | batch | rounds | {other} | {this} | times faster | quartiles of the rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        seconds = row["seconds"]
        low, high = row["spread"]
        lines.append(
            f"| {row['work']}, {row['shape']} | {row['batch']} | {row['rounds']} | {seconds['other']:.3f} s | "
            f"{seconds['this']:.3f} s | {row['ratio']:.2f} | {low:.2f} to {high:.2f} |"
        )
    return "\n".join([*lines, "", f"`{record['command']}` ({where(record['machine'])})"])


TABLES: dict[str, Callable[[], str]] = {"systems": systems, "int8": int8, "commits": commits}
