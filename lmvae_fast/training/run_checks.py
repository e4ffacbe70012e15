"""What a run is refused for before any work, because it could only fail later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmvae_fast.config import TrainConfig
from lmvae_fast.errors import ConfigError
from lmvae_fast.files import check_ours, claim, locked, made_as, mark, recover_folder, sweep
from lmvae_fast.training.checkpoints import folder as checkpoint
from lmvae_fast.training.distributed import Ranks
from lmvae_fast.training.precision import warn_of_imitated
from lmvae_fast.training.sharding import check_shardable

RUN = "training run"  # what a run's folder is marked as


def check_run_folder(folder: Path) -> None:
    """Before any work: a run can be written there. OutputError unless the folder is not there, is empty, or is a run's."""
    if made_as(folder) is None and checkpoint.complete(folder / "checkpoints"):
        mark(folder, RUN)  # written before folders were marked
    check_ours(folder, RUN)


@contextlib.contextmanager
def writing_run(folder: Path, first: bool) -> Iterator[None]:
    """Within the block a run's folder is ours, and no other process trains into it; only the first rank looks after that.

    Raises OutputError where the folder is something else's, or another process is training into it.
    """
    if not first:
        yield
        return
    check_run_folder(folder)
    claim(folder, RUN)
    with locked(folder, "a training run"):
        recover_folder(folder / "model")
        sweep(folder)
        yield


def check_run(
    model: Any, parameters: Mapping[str, nn.Parameter], config: TrainConfig, ranks: Ranks, eval_data: Any
) -> None:
    """Refuse, before any work, what could only fail later; and say what will be slow."""
    if not parameters:
        raise ConfigError("the model has no trainable parameter", remedy="unfreeze a part of it")
    half = [name for name, p in parameters.items() if p.dtype in (torch.bfloat16, torch.float16)]
    if half:
        raise ConfigError(
            "trained parameters must keep float32 master weights",
            value=f"{half[0]} is {parameters[half[0]].dtype}",
            remedy="model.float() what trains, and choose precision='bf16' or 'fp16' for the arithmetic",
        )
    warn_of_imitated(config.precision, next(iter(parameters.values())).device.type)
    if config.shard:
        check_shardable(model, config, ranks)
    if not ranks.alone and model.config.objective == "langvae-0.6":
        raise ConfigError(
            "objective='langvae-0.6' multiplies sums of a whole batch, so processes cannot share one",
            value=f"{ranks.world} processes",
            limit=1,
            remedy="use objective='elbo', or one process",
        )
    if eval_data is None and (config.schedule == "plateau" or config.early_stop is not None):
        raise ConfigError(
            "schedule='plateau' and early_stop go by an evaluation figure",
            value="eval_data=None",
            remedy="give eval_data, for instance dataset.split(held_out=0.1, seed=0)",
        )
