"""The profile of decoding: the engine beside its eager form over batch sizes, part by part, against the machine's limits."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError
from lmvae_fast.generation.engine import generate, token_limit
from lmvae_fast.kernels import philox
from lmvae_fast.kernels.backend import backend
from lmvae_fast.models.decoder.linear_weights import Linear
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.profiling.breakdown import Side, break_down
from lmvae_fast.profiling.measure import interleave, machine, machine_limits, speedup
from lmvae_fast.profiling.parts import DECODING_PARTS, watching_decoding

EAGER = "the same loop with every op in plain torch"


def profile_generate(
    model: LMVAE,
    config: GenerationConfig,
    *,
    batches: Sequence[int] = (1, 32, 256),
    folder: Path,
    seconds: float = 20.0,
    reference: bool = True,
) -> dict[str, Any]:
    """Time, bytes, FLOPs and memory of decoding latents of the prior, for each batch size.

    Every sentence gets all of its tokens: the end token ends none, so that all sides and sizes do the same work.

    Args:
        model: any LMVAE. config: how tokens are chosen, and how many; its ``batch_size`` is not read.
        batches: sentences at a time.
        folder: where ``trace-fast-BATCH.json`` and ``trace-reference-BATCH.json`` go (Chrome's trace format).
        seconds: of timing, all batch sizes together (one round each at least).
        reference: whether the loop in plain torch (``LMVAE_BACKEND=reference``) is measured too.

    Returns:
        a JSON-able record: ``batches``, each with ``sides`` by name as in :func:`~lmvae_fast.profiling.train.profile_train`
        (``seconds`` of the whole decoding), and besides ``sentences_per_s``, ``tokens_per_s``, ``first_token_seconds``,
        ``flops_per_step``, ``bytes_per_step`` and ``share_of_limit``: the least time in which the machine could read every
        weight once a step as it is held, or multiply the batch by it, over the time taken.

    Raises:
        ConfigError: no batch size, or one below 1; more tokens than the model allows; beam search.
    """
    if not batches or min(batches) < 1:
        raise ConfigError("nothing to profile", value=f"batches={list(batches)}", limit="sizes of at least 1")
    if config.num_beams > 1:
        raise ConfigError("beam search is not profiled", value=f"num_beams={config.num_beams}", limit=1)
    tokens, device = token_limit(model, config), model.device
    folder.mkdir(parents=True, exist_ok=True)
    limits = machine_limits(device.type, 0.5)
    dtype = "bfloat16" if model.decoder.dtype == torch.bfloat16 else "float32"
    record: dict[str, Any] = {
        "machine": machine(device.type), "limits": limits, "matrix_dtype": dtype, "model": model.config.to_dict(),
        "generation": config.to_dict(), "tokens": tokens, "weight_bytes": _step_weights(model)[1], "batches": [],
    }  # fmt: skip
    with _without_end_token(model):
        for batch in batches:
            row = _one_batch(model, config, batch, tokens, record, folder, seconds / len(batches), reference)
            record["batches"].append(row)
    return record


def _one_batch(
    model: LMVAE, config: GenerationConfig, batch: int, tokens: int, record: dict[str, Any], folder: Path, seconds: float,
    reference: bool,
) -> dict[str, Any]:  # fmt: skip
    z = philox.normal(philox.seed_tensor(0, model.device), (batch, model.config.latent_dim))
    labels = None
    if model.config.conditional_decoder:
        labels = torch.zeros(batch, len(model.config.annotations), device=model.device)
    config = config.replace(batch_size=batch)
    decoders = {"fast": functools.partial(_decode, model, z, labels, config)}
    names = {"fast": "lmvae_fast"}
    if reference:
        decoders["reference"] = functools.partial(decoders["fast"], eager=True)
        names["reference"] = EAGER
    calls: dict[str, Callable[[], Any]] = {name: functools.partial(run, tokens) for name, run in decoders.items()}
    times = interleave(calls, seconds, model.device.type, rounds=1)
    firsts: dict[str, Callable[[], Any]] = {name: functools.partial(run, 1) for name, run in decoders.items()}
    first = interleave(firsts, 0.0, model.device.type, rounds=3)
    watch = functools.partial(watching_decoding, model=model)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    out: dict[str, Any] = {"batch": batch, "sides": {}}
    for name, run in decoders.items():
        # a recorded step has no parts to be seen: it is taken apart as it runs without a recording
        apart = functools.partial(run, tokens, cuda_graphs=False)
        side = Side(names[name], apart, model.device, watch, lambda: held)
        trace = folder / f"trace-{name}-{batch}.json"
        figures = break_down(side, times[name], DECODING_PARTS, record["limits"], record["matrix_dtype"], trace)
        out["sides"][name] = figures | _per_step(figures, model, batch, tokens, record) | {
            "first_token_seconds": statistics.median(first[name])
        }  # fmt: skip
    if reference:
        out["speedup"] = speedup(times, "fast", "reference")
    return out


def _decode(
    model: LMVAE,
    z: Tensor,
    labels: Tensor | None,
    config: GenerationConfig,
    tokens: int,
    *,
    eager: bool = False,
    **other: Any,
) -> None:
    config = config.replace(max_new_tokens=tokens, pack_weights=config.pack_weights and not eager, **other)
    with backend("reference") if eager else contextlib.nullcontext():
        for _ in generate(model, z, config, annotations=labels):
            pass


def _per_step(
    figures: dict[str, Any], model: LMVAE, batch: int, tokens: int, record: dict[str, Any]
) -> dict[str, float]:
    """Figures of a step of all rows without the projection of the latents, and its share of the machine's limit."""
    limits = record["limits"]
    rate, bandwidth = limits[f"matmul_{record['matrix_dtype']}_flops_per_s"], limits["copy_bytes_per_s"]
    count, size = _step_weights(model)
    # a copy reads and writes: reading alone is taken to go at its rate
    least = {"bandwidth": size / bandwidth, "arithmetic": 2 * count * batch / rate}
    bound = max(least, key=lambda name: least[name])
    steps = [row for row in figures["parts"] if row["part"] != "latent_kv"]
    return {
        "sentences_per_s": batch / figures["seconds"], "tokens_per_s": batch * tokens / figures["seconds"],
        "seconds_per_step": figures["seconds"] / tokens, "flops_per_step": sum(row["flops"] for row in steps) / tokens,
        "bytes_per_step": sum(row["bytes"] for row in steps) / tokens,
        "bound_by": bound, "share_of_limit": least[bound] * tokens / figures["seconds"],
    }  # fmt: skip


def _step_weights(model: LMVAE) -> tuple[int, int]:
    """Elements and bytes of the matrices that every step multiplies by: linear maps of the layers, and the head."""
    maps = [module.weight for module in model.decoder.body.modules() if isinstance(module, Linear)]
    weights = [*maps, model.decoder.head_weight]
    return sum(w.numel() for w in weights), sum(w.numel() * w.element_size() for w in weights)


@contextlib.contextmanager
def _without_end_token(model: LMVAE) -> Iterator[None]:
    """Keep every sentence from ending before its last token, within this block."""
    tokenizer = model.decoder.tokenizer
    before, tokenizer.eos_token_id = tokenizer.eos_token_id, -1
    try:
        yield
    finally:
        tokenizer.eos_token_id = before
