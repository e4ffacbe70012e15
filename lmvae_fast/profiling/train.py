"""The profile of a training step: the fast path beside the eager reference, part by part, against the machine's limits."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lmvae_fast.config import TrainConfig
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.profiling.breakdown import Side, break_down
from lmvae_fast.profiling.eager import EagerStep
from lmvae_fast.profiling.measure import interleave, machine, machine_limits, speedup
from lmvae_fast.profiling.parts import PARTS, Parts, as_part, watching
from lmvae_fast.profiling.step import TrainingStep


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
        watch = functools.partial(
            _watching_step, model=model, owner=fast.trainer.state.optimizer, methods=("norm", "step")
        )
        sides = {"fast": Side("lmvae_fast", fast, device, watch, fast.held_bytes)}
        if eager is not None:
            watch = functools.partial(_watching_step, model=eager.model, owner=eager, methods=("update",))
            sides["reference"] = Side(eager.name, eager, device, watch, eager.held_bytes)
        times = interleave({name: side.call for name, side in sides.items()}, seconds, device.type, rounds=3)
        record: dict[str, Any] = {
            "machine": machine(device.type), "limits": limits, "matrix_dtype": dtype, "precision": config.precision,
            "model": model.config.to_dict(), "sentences": batch.batch_size, "tokens": batch.num_tokens, "sides": {},
        }  # fmt: skip
        for name, side in sides.items():
            # short steps are traced thrice: one alone would show every hiccup of the machine
            traced = 3 if statistics.median(times[name]) < 1.0 else 1
            trace = folder / f"trace-{name}.json"
            figures = break_down(side, times[name], PARTS, limits, dtype, trace, traced=traced)
            record["sides"][name] = {**figures, "tokens_per_s": batch.num_tokens / figures["seconds"]}
    body = fast.trainer.body
    record["decoder_layers"] = "modules" if body is None else body.runs
    record["encoder_pass_seconds"] = None if model.encoder.trains else _encoder_seconds(model, batch.texts)
    if reference:
        record["speedup"] = speedup(times, "fast", "reference")
    return record


def _encoder_seconds(model: LMVAE, texts: Sequence[str]) -> float:
    """Seconds of the one pass over a frozen encoder that a batch needs before its first epoch."""
    sentences = model.tokenize(texts)
    run = interleave({"encoder": lambda: model.pool(sentences)}, 0.2, model.device.type, rounds=3)
    return statistics.median(run["encoder"])


@contextlib.contextmanager
def _watching_step(parts: Parts, model: torch.nn.Module, owner: Any, methods: tuple[str, ...]) -> Iterator[None]:
    """Like ``watching``, with these methods of ``owner`` as the optimizer's part."""
    with watching(parts, model), as_part(parts, "optimizer", owner, *methods):
        yield
