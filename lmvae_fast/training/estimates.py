"""What a run will take, before it takes it: steps, memory, disk and time. Nothing is written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from lmvae_fast.config import FlowTrainConfig, TrainConfig
from lmvae_fast.memory import free_disk
from lmvae_fast.training.batch_plan import groups_of, steps_per_epoch


def estimate_run(model: Any, train_data: Any, config: TrainConfig) -> dict[str, Any]:
    """Figures of a run of this configuration, in bytes and seconds.

    Time is that of one forward and backward pass here, times the passes; evaluations, saving and the encoding of the cache come
    on top of it. Raises what ``model.tokenize`` raises.
    """
    sentences = model.tokenize(train_data, on_long=config.on_long)
    groups = groups_of(sentences, config.batch_size)
    per_epoch = steps_per_epoch(len(sentences), config.batch_size, config.accumulation, groups)
    steps = config.max_steps or config.epochs * per_epoch
    trains = [part for part in model.parameters() if part.requires_grad]
    trained = sum(part.numel() * part.element_size() for part in trains)
    checkpoint = 3 * trained + (1 << 16)  # the weights and AdamW's two moments
    width = getattr(model.encoder, "width", 0) if not model.config.train_encoder else 0
    return {
        "sentences": len(sentences), "tokens": sum(sentences.lengths), "steps": steps,
        "trainable_parameters": sum(part.numel() for part in trains), "training_state_bytes": 4 * trained,
        "checkpoint_bytes": checkpoint, "cache_bytes": 4 * len(sentences) * width + 24 * sum(sentences.lengths),
        "disk_bytes": (config.keep_checkpoints + 2) * checkpoint + trained, "disk_free": free_disk(Path(config.output_dir)),
        "seconds": round(steps * config.accumulation * _pass_seconds(model, sentences, config.batch_size), 3),
    }  # fmt: skip


def _pass_seconds(model: Any, sentences: Any, batch_size: int) -> float:
    rows = range(min(batch_size, len(sentences)))
    batch = model.make_batch(sentences, rows).to(model.device)
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        model(batch, seed=0).loss.backward()
        seconds = time.perf_counter() - started
        model.zero_grad(set_to_none=True)
    return seconds


def estimate_fit(model: Any, definitions: Any, config: FlowTrainConfig, *, missing: str = "error") -> dict[str, Any]:
    """Figures of fitting the flow of an InvertibleCVAE that knows its word vectors, in bytes and seconds.

    Time is that of one step here, times the steps, and of encoding a batch of glosses, times their batches. Raises DataError
    for a word without a vector where ``missing`` is ``"error"``.
    """
    from lmvae_fast.training.flow_data import run_flow

    kept, vectors = definitions.with_vectors(model.vectors, missing=missing)
    shown = kept[: min(64, len(kept))]
    started = time.perf_counter()
    posterior = model.posteriors(shown.glosses)
    encoding = (time.perf_counter() - started) * -(-len(kept) // 64)
    steps = config.max_steps or config.epochs * -(-len(kept) // config.batch_size)
    theta = model.flow.theta
    model.set_width(vectors.shape[1])
    model.bridge.fit(model._checked(vectors).unique(dim=0))
    pairs = model.pairs(shown, vectors[: len(shown)], posterior)
    chosen = torch.arange(min(config.batch_size, len(kept)), device=theta.device) % len(shown)
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        z, logdet, base = run_flow(model, pairs, chosen)
        base.nll(z, logdet).mean().backward()
        seconds = time.perf_counter() - started
        theta.grad = None
    held = theta.numel() * theta.element_size()
    checkpoint = 4 * held + (1 << 16)  # the flow, AdamW's two moments, and the best flow so far
    cache = 8 * len(kept) * model.vae.config.latent_dim
    return {
        "definitions": len(definitions), "skipped": len(definitions) - len(kept), "steps": steps,
        "trainable_parameters": theta.numel(), "training_state_bytes": 5 * held, "checkpoint_bytes": checkpoint,
        "cache_bytes": cache, "disk_bytes": (config.keep_checkpoints + 2) * checkpoint + held + cache,
        "disk_free": free_disk(Path(config.output_dir)), "seconds": round(steps * seconds + encoding, 3),
    }  # fmt: skip
