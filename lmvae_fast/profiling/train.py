"""The profile of a training step: the fast path beside the eager reference, part by part, against the machine's limits."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmvae_fast.config import TrainConfig
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.profiling.cost import Cost
from lmvae_fast.profiling.eager import EagerStep
from lmvae_fast.profiling.energy import joules_per_call
from lmvae_fast.profiling.measure import interleave, machine, machine_limits, peak_memory
from lmvae_fast.profiling.parts import PARTS, RANGE, Parts, as_part, watching
from lmvae_fast.profiling.step import TrainingStep

_BACKWARD = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class Side:
    """One of the two steps that are compared: what to call, its model, and the methods that are the optimizer's part."""

    name: str
    step: Callable[[], None]
    model: torch.nn.Module
    optimizer: tuple[Any, tuple[str, ...]]
    held_bytes: Callable[[], int]


def profile_train(
    model: LMVAE,
    texts: Sequence[str],
    config: TrainConfig,
    *,
    folder: Path,
    seconds: float = 5.0,
    reference: bool = True,
) -> dict[str, Any]:
    """Time, bytes, FLOPs and memory of a training step on the first batch of ``texts``.

    Args:
        model: trained in place by the steps that are timed: give a copy of what you want to keep.
        texts: at least one batch of sentences. config: batch size, precision, learning rate, clipping.
        folder: where ``trace-fast.json`` and ``trace-reference.json`` go (Chrome's trace format; ui.perfetto.dev reads it).
        seconds: of timing, both sides together (three rounds at least).
        reference: whether the eager reference is measured too; it needs a second copy of both models.

    Returns:
        a JSON-able record: ``sides`` by name, each with ``seconds`` (median), ``tokens_per_s``, ``parts`` and totals.
        A part's ``seconds`` are its share of traced steps times the median of untraced ones; ``share_of_limit`` is the
        least time that the machine's measured matrix rate or copy bandwidth allows, over the time taken. Bytes are those
        of all inputs and outputs, op by op, so caches can make a bandwidth share exceed 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = model.device
    limits = machine_limits(device.type, 0.5)
    dtype = "bfloat16" if config.precision == "bf16" or model.config.dtype == "bfloat16" else "float32"
    fast = TrainingStep(model, texts, config)
    batch = fast.batch()
    # copied before training prepares the model for its steps (another dtype of what is frozen, a fused optimizer)
    eager = EagerStep(model, batch.texts, config) if reference else None
    with fast:
        sides = {
            "fast": Side("lmvae_fast", fast, model, (fast.trainer.update, ("norm", "step")), fast.held_bytes)
        }
        if eager is not None:
            sides["reference"] = Side(eager.name, eager, eager.model, (eager, ("update",)), eager.held_bytes)
        times = interleave({name: side.step for name, side in sides.items()}, seconds, device.type, rounds=3)
        record: dict[str, Any] = {
            "machine": machine(device.type), "limits": limits, "matrix_dtype": dtype, "precision": config.precision,
            "model": model.config.to_dict(), "sentences": batch.batch_size, "tokens": batch.num_tokens, "sides": {},
        }  # fmt: skip
        for name, side in sides.items():
            record["sides"][name] = _measure(side, times[name], batch.num_tokens, limits, dtype, folder, name)
    record["encoder_pass_seconds"] = None if model.encoder.trains else _encoder_seconds(model, batch.texts)
    if reference:
        record["speedup"] = statistics.median(b / a for a, b in zip(times["fast"], times["reference"], strict=True))
    return record


def _encoder_seconds(model: LMVAE, texts: Sequence[str]) -> float:
    """Of the one pass over a frozen encoder that a batch needs before its first epoch."""
    sentences = model.tokenize(texts)
    run = interleave({"encoder": lambda: model.pool(sentences)}, 0.2, model.device.type, rounds=3)
    return statistics.median(run["encoder"])


def _measure(
    side: Side, times: list[float], tokens: int, limits: dict[str, float], dtype: str, folder: Path, name: str
) -> dict[str, Any]:
    device = next(side.model.parameters()).device
    parts, taken = Parts(), statistics.median(times)
    owner, methods = side.optimizer
    with watching(parts, side.model), as_part(parts, "optimizer", owner, *methods):
        with Cost(parts.now) as cost:
            side.step()
        parts.reset()
        trace = folder / f"trace-{name}.json"
        # short steps are traced thrice: one alone would show every hiccup of the machine
        shares = _traced_shares(side.step, parts, device, trace, 3 if taken < 1.0 else 1)
    joules, why_not = joules_per_call(side.step, device)
    rate, bandwidth = limits[f"matmul_{dtype}_flops_per_s"], limits["copy_bytes_per_s"]
    rows = []
    for part in PARTS:
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
        "name": side.name, "seconds": taken, "rounds": len(times), "tokens_per_s": tokens / taken, "flops": flops,
        "bytes": sum(cost.bytes.values()), "share_of_matrix_rate": flops / rate / taken,
        "held_bytes": side.held_bytes(), "peak_extra_bytes": peak_memory(side.step, device.type),
        "joules": joules, "no_energy_because": why_not, "trace": str(trace), "parts": rows,
    }  # fmt: skip


def _traced_shares(
    step: Callable[[], None], parts: Parts, device: torch.device, trace: Path, steps: int
) -> dict[str, float]:
    """Share of each part in some steps under torch's profiler, whose trace is written."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            parts.switch("other")
            step()
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
    path, found = [], "other"
    while event is not None:
        if event.id in known:
            found = known[event.id]
            break
        path.append(event.id)
        if event.name.startswith(_BACKWARD):
            found = parts.of_node(event.sequence_nr)
            break
        if event.name.startswith(RANGE):
            found = event.name[len(RANGE) :]
            break
        event = event.cpu_parent
    known.update(dict.fromkeys(path, found))
    return found
