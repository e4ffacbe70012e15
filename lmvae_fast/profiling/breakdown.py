"""A call broken down: time by part, FLOPs, bytes, memory and energy, each against the machine's limits."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmvae_fast.profiling.cost import Cost
from lmvae_fast.profiling.energy import joules_per_call
from lmvae_fast.profiling.measure import peak_memory
from lmvae_fast.profiling.parts import RANGE, Parts

_BACKWARD = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a call, and what must be known to break it down.

    ``call`` does the work once; ``watch`` is a context within which it switches the parts it is given; ``held_bytes`` says
    what stays between calls.
    """

    name: str
    call: Callable[[], Any]
    device: torch.device
    watch: Callable[[Parts], AbstractContextManager[Any]]
    held_bytes: Callable[[], int]


def break_down(
    side: Side,
    times: Sequence[float],
    names: Sequence[str],
    limits: dict[str, float],
    dtype: str,
    trace: Path,
    *,
    traced: int = 1,
) -> dict[str, Any]:
    """A JSON-able record of one side: totals, and ``parts`` in the order of ``names``.

    Args:
        times: seconds of calls without a profiler; their median is what the parts share out.
        names: of the parts.
        limits: of the machine, as ``machine_limits`` measures them. dtype: whose matrix rate is the limit.
        trace: file of the profiler's trace. traced: calls under the profiler, which give each part's share.
    """
    parts, taken = Parts(), statistics.median(times)
    with side.watch(parts):
        with Cost(parts.now) as cost:
            side.call()
        parts.reset()
        shares = _traced_shares(side.call, parts, side.device, trace, traced)
    joules, why_not = joules_per_call(side.call, side.device)
    rate, bandwidth = limits[f"matmul_{dtype}_flops_per_s"], limits["copy_bytes_per_s"]
    rows = []
    for part in names:
        seconds, flops, moved = shares.get(part, 0.0) * taken, cost.flops[part], cost.bytes[part]
        bound = max(flops / rate, moved / bandwidth)
        rows.append({
            "part": part, "seconds": seconds, "share": shares.get(part, 0.0), "flops": flops, "bytes": moved,
            "bound_by": "arithmetic" if flops / rate >= moved / bandwidth else "bandwidth",
            "share_of_matrix_rate": flops / rate / seconds if seconds else 0.0,
            "share_of_bandwidth": moved / bandwidth / seconds if seconds else 0.0,
            "share_of_limit": bound / seconds if seconds else 0.0,
        })  # fmt: skip
    flops = sum(cost.flops.values())
    return {
        "name": side.name, "seconds": taken, "rounds": len(times), "flops": flops, "bytes": sum(cost.bytes.values()),
        "share_of_matrix_rate": flops / rate / taken, "held_bytes": side.held_bytes(),
        "peak_extra_bytes": peak_memory(side.call, side.device.type, warm=True),
        "joules": joules, "no_energy_because": why_not, "trace": str(trace), "parts": rows,
    }  # fmt: skip


def _traced_shares(
    call: Callable[[], Any], parts: Parts, device: torch.device, trace: Path, calls: int
) -> dict[str, float]:
    """Share of each part in some calls under torch's profiler, whose trace is written."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            parts.switch("other")
            call()
            parts.close()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    profile.export_chrome_trace(str(trace))
    spent: dict[str, float] = defaultdict(float)
    owners: dict[int, str] = {}
    for event in profile.events():
        on_device = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if event.device_type == torch.autograd.DeviceType.CPU:
            spent[_owner(event, parts, owners)] += on_device
    total = sum(spent.values()) or 1.0
    return {part: value / total for part, value in spent.items()}


def _owner(event: Any, parts: Parts, known: dict[int, str]) -> str:
    """The part of an event: the nearest range or backward node it stands in."""
    path, part = [], "other"
    while event is not None:
        if event.id in known:
            part = known[event.id]
            break
        path.append(event.id)
        if event.name.startswith(_BACKWARD):
            part = parts.of_node(event.sequence_nr)
            break
        if event.name.startswith(RANGE):
            part = event.name[len(RANGE) :]
            break
        event = event.cpu_parent
    known.update(dict.fromkeys(path, part))
    return part
