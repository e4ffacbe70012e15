"""Whether a checkpoint may be continued by this run: same data, same model, same recipe."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from lmvae_fast.config import LMVAEConfig, TrainConfig
from lmvae_fast.config.base import ConfigBase
from lmvae_fast.errors import CheckpointError, ConfigError, DataError, OutputError
from lmvae_fast.models.systems import resolve
from lmvae_fast.training.checkpoints import folder as checkpoint
from lmvae_fast.training.checkpoints.tensors import frozen_fingerprint

# Fields that leave every step as it was ...
FREE = {
    "output_dir",
    "resume",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "cache_dir",
    "tensorboard",
    "keep_best",
    "final_model",
    "progress",
    "shard",
}
# ... and fields that one may well want to change half-way, although the run is then no longer the one that was begun.
CHANGEABLE = {
    "epochs",
    "max_steps",
    "eval_every",
    "eval_batch_size",
    "early_stop",
    "monitor",
    "fused_projector_update",
    "embedding_rows_update",
    "recompute_decoder",
    "compile",
    "cuda_graphs",
}


def find(config: TrainConfig, folder: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, verified; None for a fresh start.

    resume=True takes the newest whole one in `folder` (a fresh start if there is none yet, so that one command line
    both starts and continues a run); a path names a checkpoint folder, or a run's output folder for its newest.
    Raises OutputError for a fresh start on top of another run's checkpoints, CheckpointError for an unusable one.
    """
    path = Path(config.resume) if isinstance(config.resume, str) else None
    if config.resume is not True:
        elsewhere = path is None or folder.resolve() not in (path.resolve().parent, (path / "checkpoints").resolve())
        log = folder.parent / "metrics.jsonl"
        if elsewhere and not checkpoint.complete(folder) and log.is_file() and log.stat().st_size:
            raise OutputError(
                "output_dir holds the records of a run, though none of its checkpoints",
                value=log,
                remedy="begin it again with resume=True, which keeps them aside, or choose another output_dir",
            )
        if elsewhere and checkpoint.complete(folder):
            raise OutputError(
                "output_dir already holds the checkpoints of a run",
                value=folder,
                remedy="continue it with resume=True, or choose another output_dir",
            )
    if path is None:
        return checkpoint.load_latest(folder) if config.resume else None
    if (path / "checkpoints").is_dir():
        found = checkpoint.load_latest(path / "checkpoints")
        if found is None:
            raise CheckpointError("no complete checkpoint in the run folder", value=path, remedy="start it anew")
        return found
    return checkpoint.load(path)


def identity(config: TrainConfig, model: Any, train_data: str, eval_data: str | None) -> dict[str, Any]:
    """What a checkpoint records of the run it belongs to; the data and what is frozen as fingerprints."""
    return {
        "train_config": config.to_dict(),
        "model_config": model.config.to_dict(),
        "frozen": frozen_fingerprint(model),
        "train_data": train_data,
        "eval_data": eval_data,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": next(model.parameters()).device.type,
    }


def check(
    saved: dict[str, Any],
    current: dict[str, Any],
    *,
    model: type[ConfigBase] = LMVAEConfig,
    train: type[ConfigBase] = TrainConfig,
) -> None:
    """Compare two identities, whose configurations are of these classes.

    Raises DataError for other training data, CheckpointError for another model, ConfigError for another recipe; warns
    of what changes the run's course without breaking it (length, evaluation, thread count, torch version).
    """
    # Fields that came after a checkpoint was written had the value that is their default now.
    saved = saved | {
        "model_config": _completed(saved["model_config"], current["model_config"], model()),
        "train_config": _completed(saved["train_config"], current["train_config"], train()),
    }
    changed = _differences(saved["model_config"], current["model_config"])
    if saved["frozen"] == current["frozen"]:  # the same weights, wherever they lie now
        changed = {name: pair for name, pair in changed.items() if name not in ("encoder", "decoder")}
    else:
        changed["weights of the frozen parts"] = ("those of the run", "others")
    if changed:
        raise CheckpointError(
            f"the checkpoint belongs to another model: {_show(changed)}", remedy="build the model it was trained with"
        )
    if saved["train_data"] != current["train_data"]:
        raise DataError(
            "the run being resumed was started on other training sentences",
            value=current["train_data"][:16],
            limit=saved["train_data"][:16],
            remedy="give the same data (and on_long), or start a new output_dir",
        )
    changed = _differences(saved["train_config"], current["train_config"])
    fixed = {name: pair for name, pair in changed.items() if name not in FREE | CHANGEABLE}
    if fixed:
        raise ConfigError(
            f"a resumed run must keep its recipe; changed (saved -> now): {_show(fixed)}",
            remedy="restore these, or start a new output_dir",
        )
    noted = {name: pair for name, pair in changed.items() if name in CHANGEABLE}
    for name in ("eval_data", "torch", "threads", "device"):
        if saved[name] != current[name]:
            noted[name] = (saved[name], current[name])
    if noted:
        warnings.warn(
            f"resumed with changes, so the run will not be bit for bit the one begun (saved -> now): {_show(noted)}",
            stacklevel=3,
        )


def _completed(saved: dict[str, Any], current: dict[str, Any], made: ConfigBase) -> dict[str, Any]:
    """A configuration with the fields that it was written before, at their defaults or as its preset fills them."""
    defaults = made.to_dict()
    if isinstance(made, LMVAEConfig) and current.keys() == defaults.keys() and saved.keys() <= current.keys():
        return resolve(LMVAEConfig.from_dict(saved)).to_dict()
    return {name: value for name, value in defaults.items() if name in current} | saved


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = list(dict.fromkeys([*saved, *current]))
    return {name: (saved.get(name), current.get(name)) for name in names if saved.get(name) != current.get(name)}


def _show(changed: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name}: {before} -> {now}" for name, (before, now) in changed.items())
