"""Table of what each integration gains, from benchmarks/results/<make>/integrations/*.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.records import RESULTS, load, where
from benchmarks.makes import MAKES


def _records() -> list[dict[str, Any]]:
    """The records, in the order of their files' names, each of the first make that has one."""
    files = {
        file.name: str(Path(make, "integrations", file.name))
        for make in reversed(MAKES)
        for file in (RESULTS / make / "integrations").glob("*.json")
    }
    return [record for _, path in sorted(files.items()) if (record := load(path)) is not None]


def integrations() -> str:
    """Times faster than each framework's own example, with the quartiles of the rounds."""
    records = _records()
    if not records:
        return "Not measured."
    lines = [
        "| integration | work | case | before | after | times faster | quartiles | found equal before timing |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for record in records:
        for row in record["rows"]:
            slow = row["seconds"][record["before"]]
            for side, factor in row["speedup"].items():
                low, high = row["quartiles"][side]
                exact = f"{record['compared']} ({row['difference']:.0e})" if side == "ours" else "no: another objective"
                lines.append(
                    f"| {record['integration']} | {row['work']} | {row['case']} | {record['before']}, {_time(slow)} | "
                    f"{side}, {_time(row['seconds'][side])} | {factor:.2f} | {low:.2f} to {high:.2f} | {exact} |"
                )
        notes.append(f"- `{record['command']}` ({where(record['machine'])})")
    return "\n".join([*lines, "", *notes])


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


TABLES: dict[str, Callable[[], str]] = {"integrations": integrations}
