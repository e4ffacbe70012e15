"""Timing in turn, peak memory, the machine's own limits, and the facts that belong to a figure."""

from __future__ import annotations

import functools
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

from lmvae_fast.kernels import backend  # loads the extension, whose op is asked below

Result = TypeVar("Result")
ROOT = Path(__file__).resolve().parent.parent.parent


def wait(device: str) -> None:
    """Wait until a CUDA device has done its work; returns at once on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def call_seconds(function: Callable[[], Any], device: str = "cpu", repeats: int = 1) -> float:
    """Seconds of a call, as the mean of ``repeats`` calls."""
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    wait(device)
    return (time.perf_counter() - start) / repeats


def take_turns(
    sides: Mapping[str, Callable[[], Result]], rounds: int, *, seconds: float = 0.0, discarded: int = 0
) -> dict[str, list[Result]]:
    """Results of each side, called once a round and in random order within each round.

    A machine's speed drifts. Sides that take turns meet the same drift, so a ratio within a round does not see it:
    :func:`speedup` is the median of these.

    Args:
        sides: by name; each call returns what is kept of it, such as its seconds.
        rounds: at least; they go on until ``seconds`` have passed (2,000 at most).
        discarded: rounds before these, whose results are dropped: a first call allocates and compiles.
    """
    results: dict[str, list[Result]] = {name: [] for name in sides}
    order, shuffle = list(sides), random.Random(0)
    for _ in range(discarded):
        for name in order:
            sides[name]()
    start, done = time.perf_counter(), 0
    while done < rounds or (seconds and time.perf_counter() - start < seconds and done < 2000):
        shuffle.shuffle(order)
        for name in order:
            results[name].append(sides[name]())
        done += 1
    return results


def interleave(
    sides: Mapping[str, Callable[[], Any]], seconds: float, device: str, *, rounds: int = 20
) -> dict[str, list[float]]:
    """Seconds per call of each side, timed in turn.

    Goes on for about ``seconds`` in all, and for ``rounds`` rounds at least; calls shorter than 2 ms are timed in groups.
    """
    timed: dict[str, Callable[[], float]] = {}
    for name, function in sides.items():
        shortest = call_seconds(function, device)
        if shortest < 1.0:  # what takes longer is warm by now, and of no group
            for _ in range(min(2, rounds - 1)):
                function()
            # short calls are timed in groups of about 2 ms, so that the clock and its call do not count
            shortest = min(call_seconds(function, device) for _ in range(min(5, rounds)))
        timed[name] = functools.partial(call_seconds, function, device, max(1, int(2e-3 / max(1e-7, shortest))))
    return take_turns(timed, rounds, seconds=seconds)


def speedup(times: Mapping[str, Sequence[float]], side: str, baseline: str) -> float:
    """Speed-up of ``side`` over ``baseline``: the median over rounds of the ratio within a round."""
    return statistics.median(slow / fast for fast, slow in zip(times[side], times[baseline], strict=True))


def peak_memory(function: Callable[[], Any], device: str, *, warm: bool = False) -> int:
    """Most bytes that torch held during a call beyond what it held before. warm: it has been called already."""
    if not warm:
        function()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()  # what was dropped before must not be given back within
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine_limits(device: str, seconds: float = 1.0) -> dict[str, float]:
    """Limits of this machine, measured now: bytes/s of a copy, FLOP/s of a matrix product."""
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
        product = interleave({"mm": functools.partial(torch.mm, a, b, out=out)}, seconds, device)["mm"]
        limits[f"matmul_{str(dtype).removeprefix('torch.')}_flops_per_s"] = 2 * n**3 / statistics.median(product)
    return limits


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # a machine without git
        return ""


#: What a record depends on, and not the records themselves.
_MEASURED = ("kernels", "csrc", "lmvae_fast", "benchmarks", "setup.py", "requirements", ":(exclude)benchmarks/results")


def machine(device: str) -> dict[str, Any]:
    """Facts without which no figure can be read: machine, versions, threads, commit."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    record = ROOT / "lmvae_fast" / "_build_info.json"
    build = json.loads(record.read_text()) if record.exists() else {}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "cpu_isa": torch.ops.lmvae_fast.cpu_isa() if build.get("built") and backend.extension()[0] else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": build.get("compiler", "none"),
        # a copy of the tree without its history is told its commit
        "commit": _git("rev-parse", "HEAD") or os.environ.get("LMVAE_COMMIT", "unknown"),
        "uncommitted": bool(_git("status", "--porcelain", "--", *_MEASURED)),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
