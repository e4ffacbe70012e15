"""One op against its baselines: times, peak extra memory and share of the machine's limits, measured in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lmvae_fast.profiling.measure import interleave, peak_memory, speedup


@dataclass
class Case:
    """One row of an op's table.

    name: what is measured, with its shapes. ours, baseline: functions without arguments that do the whole work once (a
    fresh graph each time, if backward is part of it). others: more sides, shown but not judged. floor: the speed-up that
    must be reached. bytes, flops: what the op must move and compute at least, for the share of the machine's limit.
    dtype: whose matrix rate limits it. check: called before timing; raises unless both sides agree.
    """

    name: str
    ours: Callable[[], Any]
    baseline: Callable[[], Any]
    baseline_name: str
    floor: float | None = None
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)
    bytes: int = 0
    flops: int = 0
    dtype: torch.dtype = torch.float32
    check: Callable[[], None] | None = None


def compiled(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function under torch.compile, already compiled. A backward inside runs as the compiled graph's own."""
    torch._dynamo.reset()
    fast = torch.compile(function, dynamic=False)
    for _ in range(3):
        fast()
    return fast


def run_case(
    case: Case, seconds: float, device: str, limits: dict[str, float], compile_baseline: bool = False
) -> dict[str, Any]:
    """Times, memory, speed-up and share of the limit of one case; with the baseline under torch.compile as one more side."""
    if case.check is not None:
        case.check()
    compilation: dict[str, Any] = {}
    sides = {"ours": case.ours, case.baseline_name: case.baseline, **case.others}
    if compile_baseline:
        start = time.perf_counter()
        try:
            sides["torch.compile"] = compiled(case.baseline)
        except Exception as error:  # the compiler's failures are its own; the other sides are still compared
            compilation["no_torch_compile"] = f"{type(error).__name__}: {error}"[:300]
        compilation["compile_seconds"] = round(time.perf_counter() - start, 1)
    times = interleave(sides, seconds, device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    row: dict[str, Any] = {
        "name": case.name,
        "baseline": case.baseline_name,
        "speedup": round(speedup(times, "ours", case.baseline_name), 3),
        "floor": case.floor,
        "rounds": len(times["ours"]),
        "microseconds": {name: round(value * 1e6, 2) for name, value in medians.items()},
        "quartiles_us": {
            name: [round(q * 1e6, 2) for q in statistics.quantiles(values, n=4)[::2]] for name, values in times.items()
        },
        "peak_extra_bytes": {name: peak_memory(function, device) for name, function in sides.items()},
    }
    row |= compilation
    if case.bytes or case.flops:
        rate = limits["matmul_bfloat16_flops_per_s" if case.dtype == torch.bfloat16 else "matmul_float32_flops_per_s"]
        by_bytes, by_flops = case.bytes / limits["copy_bytes_per_s"], case.flops / rate
        row["limit"] = {
            "bound_by": "bandwidth" if by_bytes >= by_flops else "arithmetic",
            "microseconds": round(max(by_bytes, by_flops) * 1e6, 2),
            "share": round(max(by_bytes, by_flops) / medians["ours"], 3),
        }
    return row


def _others(row: dict[str, Any], base: str) -> str:
    """Sides that ours was compared with: the judged baseline first, then the sides that are only shown."""
    names = [base, *(name for name in row["microseconds"] if name not in ("ours", base))]
    return ", ".join(f"{row['microseconds'][name]:.1f} ({name})" for name in names)


def markdown(op: str, record: dict[str, Any]) -> str:
    """The record as a table for people."""
    m = record["machine"]
    untested = "" if record.get("tests", "passed") == "passed" else " **Not tested.**"
    lines = [
        f"# {op}",
        "",
        f"{m['cpu']} ({m['cpu_isa']}), {m['threads']} threads, device {m['device']}, torch {m['torch']}, Python {m['python']}, "
        f"commit {m['commit'][:12]}{' + uncommitted changes' if m['uncommitted'] else ''}, {m['date']}. "
        f"Command: `{record['command']}`.{untested}",
        "",
        "| case | ours, us | baseline, us | speed-up | floor | peak extra memory, ours / baseline | share of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["cases"]:
        base = row["baseline"]
        mib = [row["peak_extra_bytes"][side] / 2**20 for side in ("ours", base)]
        limit = f"{row['limit']['share']:.0%} ({row['limit']['bound_by']})" if "limit" in row else ""
        lines.append(
            f"| {row['name']} | {row['microseconds']['ours']:.1f} | {_others(row, base)} | "
            f"{row['speedup']:.2f}x | {row['floor'] or ''} | {mib[0]:.2f} / {mib[1]:.2f} MiB | {limit} |"
        )
    return "\n".join(lines) + "\n"
