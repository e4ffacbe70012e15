"""The configuration of a LangVAE training run, with every field of the original, and what our loop makes of it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lmvae_fast.config import TrainConfig
from lmvae_fast.errors import ConfigError

# What torch's own classes take, and the defaults that a value must keep where our loop has no such thing.
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": _ADAM | {"weight_decay": 0.0},
    "AdamW": _ADAM | {"weight_decay": 0.01},
}
_ADAM_FIXED: dict[str, Any] = {
    "amsgrad": False, "maximize": False, "capturable": False, "differentiable": False, "foreach": None, "fused": None
}  # fmt: skip
_PLATEAU: dict[str, Any] = {"patience": 10, "factor": 0.1}
_PLATEAU_FIXED: dict[str, Any] = {
    "mode": "min", "threshold": 1e-4, "threshold_mode": "rel", "cooldown": 0, "min_lr": 0, "eps": 1e-8
}  # fmt: skip
# Fields of processes and loaders that this loop has another way for, and the defaults they must keep.
_FIXED: dict[str, tuple[Any, str]] = {
    "train_dataloader_num_workers": (0, "leave it at 0: sentences are tokenised once, before the first step"),
    "eval_dataloader_num_workers": (0, "leave it at 0: sentences are tokenised once, before the first step"),
    "steps_predict": (None, "leave it out, and decode in a callback"),
    "world_size": (-1, "start lf.train under torchrun"),
    "local_rank": (-1, "start lf.train under torchrun"),
    "rank": (-1, "start lf.train under torchrun"),
    "dist_backend": ("nccl", "start lf.train under torchrun"),
    "master_addr": ("localhost", "start lf.train under torchrun"),
    "master_port": ("12345", "start lf.train under torchrun"),
}


@dataclass
class CyclicalScheduleKLThresholdTrainerConfig:
    """How LanguageTrainingPipeline trains; fields and defaults of LangVAE 0.6.13 and pythae 0.1.2.

    Attributes:
        output_dir: a folder ``VAE_training_<time>`` is made in it.
        per_device_train_batch_size, per_device_eval_batch_size: sentences per batch; batches follow the data's order.
        num_epochs: passes over the data.
        optimizer_cls, optimizer_params: "Adam" (without weight decay) or "AdamW", with ``betas``, ``eps``, ``weight_decay``.
        scheduler_cls, scheduler_params: None, or "ReduceLROnPlateau" with ``patience`` and ``factor``, asked once an epoch.
        learning_rate: of the optimizer.
        steps_saving: epochs between the checkpoints ``checkpoint_epoch_<n>``, or None.
        keep_best_on_train: the final model is that of the epoch with the lowest training loss, not evaluation loss.
        seed: of the noise. no_cuda: stay on the CPU. amp: fp16 autocast, on CUDA.
        max_beta, n_cycles, target_kl: of the cyclical weight of the KL, and the threshold of a sentence's KL in nats.
        train_dataloader_num_workers, eval_dataloader_num_workers, steps_predict, world_size, local_rank, rank, dist_backend,
            master_addr, master_port: must keep their defaults.
        name: of the class, in files.

    Raises:
        ConfigError: a value that cannot be honoured; it names the field.
    """

    output_dir: str | None = None
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
    num_epochs: int = 100
    train_dataloader_num_workers: int = 0
    eval_dataloader_num_workers: int = 0
    optimizer_cls: str = "Adam"
    optimizer_params: dict[str, Any] | None = None
    scheduler_cls: str | None = None
    scheduler_params: dict[str, Any] | None = None
    learning_rate: float = 1e-4
    steps_saving: int | None = None
    steps_predict: int | None = None
    keep_best_on_train: bool = False
    seed: int = 8
    no_cuda: bool = False
    world_size: int = -1
    local_rank: int = -1
    rank: int = -1
    dist_backend: str = "nccl"
    master_addr: str = "localhost"
    master_port: str = "12345"
    amp: bool = False
    max_beta: float = 1.0
    n_cycles: int = 1
    target_kl: float = 2.0
    name: str = field(init=False, default="CyclicalScheduleKLThresholdTrainerConfig")

    def __post_init__(self) -> None:
        train_config(self, Path("unused"))

    def to_dict(self) -> dict[str, Any]:
        """Its fields, ready for JSON."""
        return asdict(self)


def train_config(config: Any, folder: Path) -> TrainConfig:
    """Our loop's configuration for a run in ``folder``; beta, the order of batches and the plateau are the pipeline's.

    config: ours, or the original's with the same fields. Raises ConfigError for a value that cannot be honoured.
    """
    for name, (only, remedy) in _FIXED.items():
        value = getattr(config, name, only)
        if value != only:
            raise ConfigError(f"{name} cannot be honoured", value=repr(value), limit=repr(only), remedy=remedy)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "LanguageTrainingPipeline trains in one process: LangVAE's loss multiplies sums of a whole batch",
            value=f"WORLD_SIZE={os.environ['WORLD_SIZE']}", limit=1, remedy="train with lf.train and objective='elbo'",
        )  # fmt: skip
    optimizer = _honoured(
        "optimizer", config.optimizer_cls, config.optimizer_params, _OPTIMIZERS, _ADAM_FIXED
    )  # fmt: skip
    if config.optimizer_cls == "Adam" and optimizer["weight_decay"]:
        raise ConfigError(
            "optimizer_cls='Adam' with weight_decay adds it to the gradient, which our loop does not",
            value=optimizer["weight_decay"], limit=0, remedy="use optimizer_cls='AdamW'",
        )  # fmt: skip
    plateau = plateau_of(config) or _PLATEAU
    cuda = torch.cuda.is_available() and not config.no_cuda
    if config.amp and not cuda:
        raise ConfigError("amp is fp16 on CUDA", value="amp=True on the CPU", remedy="set amp=False")
    target_kl = config.target_kl
    if not isinstance(target_kl, (int, float)) or target_kl < 0:
        raise ConfigError("target_kl is out of range", value=target_kl, limit=">= 0 nats")
    return TrainConfig(
        output_dir=str(folder), epochs=config.num_epochs, batch_size=config.per_device_train_batch_size,
        eval_batch_size=config.per_device_eval_batch_size, learning_rate=config.learning_rate,
        adam_betas=tuple(optimizer["betas"]), adam_eps=optimizer["eps"], weight_decay=optimizer["weight_decay"],
        plateau_patience=plateau["patience"], plateau_factor=plateau["factor"],
        # LangVAE clips before it computes gradients, so nothing is clipped.
        grad_clip=None, beta=config.max_beta, beta_cycles=config.n_cycles, precision="fp16" if cuda and config.amp else "fp32",
        # Every step is a record: an epoch's loss is the mean over its batches.
        log_every=1, keep_checkpoints=1, keep_best=False, monitor="loss", seed=config.seed, tensorboard=False,
    )  # fmt: skip


def plateau_of(config: Any) -> dict[str, Any] | None:
    """Patience and factor of ReduceLROnPlateau, or None without a scheduler."""
    if config.scheduler_cls is None:
        return None
    known = {"ReduceLROnPlateau": _PLATEAU}
    return _honoured("scheduler", config.scheduler_cls, config.scheduler_params, known, _PLATEAU_FIXED)


def _honoured(
    what: str, name: str, given: dict[str, Any] | None, known: dict[str, dict[str, Any]], fixed: dict[str, Any]
) -> dict[str, Any]:
    """The parameters of torch's class ``name``, its defaults filled in. Raises ConfigError for what is not in ``known``."""
    if name not in known:
        raise ConfigError(f"{what}_cls cannot be honoured", value=repr(name), limit=", ".join(known))
    out = dict(known[name])
    for key, value in (given or {}).items():
        if key in out:
            out[key] = value
        elif key not in fixed or value != fixed[key]:
            raise ConfigError(
                f"{what}_params[{key!r}] cannot be honoured", value=repr(value),
                limit=repr(fixed[key]) if key in fixed else ", ".join(out), remedy="leave it out, or train with lf.train",
            )  # fmt: skip
    return out
