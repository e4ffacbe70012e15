"""The table of the long run, from benchmarks/results/generation/long_run.json."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.common.records import load, where


def long_run() -> str:
    """Memory behind the first tenth and at the end, and whether a killed run gave the same file."""
    record = load("generation/long_run.json")
    if record is None:
        return "Not measured."
    held, kills = record["memory"], record["kills_after_seconds"]
    rows = [("latents", f"{record['latents']:,}")]
    for title, name in (("second tenth of the file", "after_a_tenth"), ("last tenth", "at_the_end")):
        part = held[name]
        rows.append(
            (
                f"resident memory, {title}",
                f"{part['median_bytes'] / 1e6:,.0f} MB (at most {part['peak_bytes'] / 1e6:,.0f} MB)",
            )
        )
    rows += [
        ("its slope over the whole run", f"{held['growth_bytes_over_the_run'] / 1e6:+,.1f} MB"),
        (
            "killed with SIGKILL",
            f"{len(kills)} times, {record['kills_in_mid_file']} of them with a part of the file written",
        ),
        ("the file after that", "the same bytes" if record["identical"] else "ANOTHER"),
    ]
    lines = ["| figure | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join([*lines, "", f"`{record['command']}`, {record['shape']}. Machine: {where(record['machine'])}."])


TABLES: dict[str, Callable[[], str]] = {"long-run": long_run}
