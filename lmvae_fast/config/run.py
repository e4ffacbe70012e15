"""What every training configuration says alike: the optimizer, the learning rate over time, and where a run goes on from."""

from __future__ import annotations

from dataclasses import dataclass

from lmvae_fast.config.base import ConfigBase
from lmvae_fast.errors import ConfigError

LEARNING_RATE_SCHEDULES = ("constant", "linear", "cosine", "plateau")


@dataclass(frozen=True)
class RunConfig(ConfigBase):
    """Fields of every run.

    Attributes:
        output_dir: folder for checkpoints, metrics and TensorBoard files.
        epochs: passes over the data; ignored when max_steps is set.
        max_steps: optimiser steps, or None.
        batch_size: what a batch has of sentences, or of whatever is trained on.
        learning_rate, adam_betas, adam_eps, weight_decay: AdamW.
        schedule: learning rate over time: ``constant``, ``linear`` (to 0), ``cosine`` (to 0) or ``plateau``.
        warmup_steps: linear warm-up before the schedule.
        plateau_patience, plateau_factor: for ``plateau``: evaluations without progress, and the factor then applied.
        grad_clip: the most that the global gradient norm may be, or None.
        eval_every, save_every, log_every: in optimiser steps; None for once an epoch.
        early_stop: evaluations without progress before stopping, or None.
        keep_checkpoints: how many of the newest to keep.
        cache_dir: where what is computed once is cached; None for ``output_dir/cache``.
        resume: continue from output_dir's newest complete checkpoint (True) or from the checkpoint folder named.
        seed: of everything random.
        tensorboard, progress: write TensorBoard files; draw a progress bar.
    """

    output_dir: str = "runs"
    epochs: int = 20
    max_steps: int | None = None
    batch_size: int = 50
    learning_rate: float = 1e-3
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    plateau_patience: int = 5
    plateau_factor: float = 0.5
    grad_clip: float | None = 1.0
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int = 10
    early_stop: int | None = None
    keep_best: bool = True
    keep_checkpoints: int = 2
    cache_dir: str | None = None
    resume: bool | str = False
    seed: int = 0
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        self._choice("schedule", LEARNING_RATE_SCHEDULES)
        for name in ("epochs", "batch_size", "log_every", "keep_checkpoints"):
            self._number(name, 1, integer=True)
        for name in ("max_steps", "eval_every", "save_every", "early_stop"):
            self._number(name, 1, integer=True, optional=True)
        for name in ("warmup_steps", "plateau_patience"):
            self._number(name, 0, integer=True)
        self._number("seed", 0, 2**63 - 1, integer=True)
        self._number("learning_rate", 0.0, open_low=True)
        self._number("adam_eps", 0.0, open_low=True)
        self._number("weight_decay", 0.0)
        self._number("plateau_factor", 0.0, 0.9999, open_low=True)
        self._number("grad_clip", 0.0, optional=True, open_low=True)
        betas = self.adam_betas
        good = isinstance(betas, tuple) and len(betas) == 2
        if not good or not all(isinstance(beta, (int, float)) and 0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(
                f"{type(self).__name__}.adam_betas is out of range", value=betas, limit="two numbers in [0, 1)"
            )
        self._text("output_dir")
        self._text("cache_dir", optional=True)
        self._flag("keep_best", "tensorboard", "progress")
        if not isinstance(self.resume, bool):
            self._text("resume")
