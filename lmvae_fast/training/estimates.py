"""What a run will take, before it takes it: steps, memory, disk and time. Nothing is written."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from lmvae_fast.config import TrainConfig
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
    place = Path(config.output_dir).absolute()
    free = shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.is_dir())).free
    return {
        "sentences": len(sentences), "tokens": sum(sentences.lengths), "steps": steps,
        "trainable_parameters": sum(part.numel() for part in trains), "training_state_bytes": 4 * trained,
        "checkpoint_bytes": checkpoint, "cache_bytes": 4 * len(sentences) * width + 24 * sum(sentences.lengths),
        "disk_bytes": (config.keep_checkpoints + 2) * checkpoint + trained, "disk_free": free,
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
