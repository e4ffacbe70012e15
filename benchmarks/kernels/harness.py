"""Interleaved timing of an op against its baselines, peak extra memory, and the machine's own limits in the same run."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent


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


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _once(function: Callable[[], Any], repeats: int, device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def interleave(sides: dict[str, Callable[[], Any]], seconds: float, device: str) -> dict[str, list[float]]:
    """Time the sides in turn, in random order within each round, for about `seconds` in all (20 rounds at least)."""
    repeats = {}
    for name, function in sides.items():
        for _ in range(3):
            function()
        # short calls are timed in groups of about 2 ms, so that the clock and its call do not count
        repeats[name] = max(1, int(2e-3 / max(1e-7, min(_once(function, 1, device) for _ in range(5)))))
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    shuffle = random.Random(0)
    start = time.perf_counter()
    while len(times[order[0]]) < 20 or (time.perf_counter() - start < seconds and len(times[order[0]]) < 2000):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(_once(sides[name], repeats[name], device))
    return times


def peak_memory(function: Callable[[], Any], device: str) -> int:
    """Most bytes that torch held during a call beyond what it held before."""
    function()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine_limits(device: str, seconds: float = 1.0) -> dict[str, float]:
    """What this machine can do at most, measured now: bytes/s of a copy, FLOP/s of a matrix product."""
    big = torch.empty(2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(big)
    big.fill_(1.0)
    target.fill_(1.0)
    limits = {}
    copy = statistics.median(interleave({"copy": lambda: target.copy_(big)}, seconds, device)["copy"])
    limits["copy_bytes_per_s"] = 2 * big.numel() * 4 / copy
    for dtype in (torch.float32, torch.bfloat16):
        n = 1024 if device == "cpu" else 8192
        a = torch.randn(n, n, device=device).to(dtype)
        b = torch.randn(n, n, device=device).to(dtype)
        out = torch.empty(n, n, device=device, dtype=dtype)
        product = interleave({"mm": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, seconds, device)["mm"]
        limits[f"matmul_{str(dtype).removeprefix('torch.')}_flops_per_s"] = 2 * n**3 / statistics.median(product)
    return limits


def compiled(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` under torch.compile, already compiled. A backward inside runs as the compiled graph's own."""
    torch._dynamo.reset()
    fast = torch.compile(function, dynamic=False)
    for _ in range(3):
        fast()
    return fast


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # a machine without git
        return ""


def machine(device: str) -> dict[str, Any]:
    """What a number cannot be read without: machine, versions, threads, commit."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = found[0] if found else cpu
    record = ROOT / "lmvae_fast" / "_build_info.json"
    build = json.loads(record.read_text()) if record.exists() else {}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "cpu_isa": torch.ops.lmvae_fast.cpu_isa() if build.get("built") else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": build.get("compiler", "none"),
        # a copy of the tree without its history is told its commit
        "commit": _git("rev-parse", "HEAD") or os.environ.get("LMVAE_COMMIT", "unknown"),
        "uncommitted": bool(
            _git("status", "--porcelain", "--", "kernels", "csrc", "benchmarks/kernels/*.py", "setup.py")
        ),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


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
    # per-round ratios: both sides of a round saw the same machine, so their median is what noise moves least
    ratio = statistics.median(b / a for a, b in zip(times["ours"], times[case.baseline_name], strict=True))
    row: dict[str, Any] = {
        "name": case.name,
        "baseline": case.baseline_name,
        "speedup": round(ratio, 3),
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
    """What ours was compared with: the judged baseline first, then the sides that are only shown."""
    names = [base, *(name for name in row["microseconds"] if name not in ("ours", base))]
    return ", ".join(f"{row['microseconds'][name]:.1f} ({name})" for name in names)


def markdown(op: str, record: dict[str, Any]) -> str:
    """The record as a table for people."""
    m = record["machine"]
    lines = [
        f"# {op}",
        "",
        f"{m['cpu']} ({m['cpu_isa']}), {m['threads']} threads, device {m['device']}, torch {m['torch']}, Python {m['python']}, "
        f"commit {m['commit'][:12]}{' + uncommitted changes' if m['uncommitted'] else ''}, {m['date']}. "
        f"Command: `{record['command']}`.",
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
