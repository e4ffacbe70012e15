"""What every run shares, whatever it trains: who watches it, where it stands, and the way from its first step to its end."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from lmvae_fast.errors import ConfigError
from lmvae_fast.signals import StopSignals
from lmvae_fast.training.callbacks import Callback, MetricsLog, ProgressBar, Shown, TensorBoard
from lmvae_fast.training.records import Progress

Result = TypeVar("Result")


class RunLoop(ABC, Generic[Result]):
    """One run; callbacks see it as `callbacks.Run`. A subclass says what a step is, and what is due after it.

    Args:
        config: of the run: `output_dir`, `tensorboard`, `progress`, `early_stop` are read here.
        callbacks: that watch it besides the log, TensorBoard and the progress bar.
        watched: whether anybody does: not on any rank but the first.
        shown: figures on the progress bar, of training and of evaluation; default: those of `ProgressBar`.

    Raises ConfigError where gradients are switched off.
    """

    model: Any
    total_steps: int
    steps_per_epoch: int

    def __init__(
        self,
        config: Any,
        callbacks: Sequence[Callback],
        *,
        watched: bool = True,
        shown: tuple[Shown, Shown] | None = None,
    ) -> None:
        if not torch.is_grad_enabled():
            inference = torch.is_inference_mode_enabled()
            raise ConfigError(
                "training needs gradients, which are switched off here",
                value="torch.inference_mode()" if inference else "torch.no_grad()",
                remedy="train outside of it",
            )
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.folder = self.output_dir / "checkpoints"
        self.log = MetricsLog(self.output_dir / "metrics.jsonl")
        self.callbacks: list[Callback] = []
        if watched:
            self.callbacks += [self.log]
            self.callbacks += [TensorBoard()] if config.tensorboard else []
            self.callbacks += [ProgressBar(*(shown or ()))] if config.progress else []
            self.callbacks += callbacks
        self.last_checkpoint: Path | None = None
        self.stop_reason: str | None = None

    # -- what a run brings -------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def progress(self) -> Progress:
        """How far it has come."""

    @abstractmethod
    def _advance(self, signals: StopSignals) -> None:
        """One step and all that is due after it."""

    @abstractmethod
    def _result(self) -> Result:
        """How it ended."""

    def surroundings(self) -> contextlib.AbstractContextManager[Any]:
        """What the whole run is within, signals and `prepared` included."""
        return contextlib.nullcontext()

    @abstractmethod
    def prepared(self) -> contextlib.AbstractContextManager[Any]:
        """The state in which steps are taken; what it sets up is given back at its end."""

    # -- what callbacks may read -------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress.step

    @property
    def epoch(self) -> int:
        """Epoch of the last step done, from 0."""
        return max(self.step - 1, 0) // self.steps_per_epoch

    def request_stop(self, reason: str) -> None:
        """End the run in order after this step; of several reasons the first is kept."""
        self.stop_reason = self.stop_reason or reason

    def tell(self, event: str, *arguments: Any) -> None:
        """Call a method of every callback."""
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """To the end, or to a reason to stop."""
        result = None
        try:
            with self.surroundings(), StopSignals() as signals, self.prepared():
                self.tell("on_train_begin")
                if self.config.early_stop is not None and self.progress.waited >= self.config.early_stop:
                    self.request_stop("early_stop")  # the run being resumed had already ended so
                while self.step < self.total_steps and self.stop_reason is None:
                    self._advance(signals)
            result = self._result()
            return result
        finally:
            self.tell("on_train_end", result)

    def is_due(self, every: int | None) -> bool:
        """Whether what is done every so many steps (None: once an epoch) is due after this one; all is after the last."""
        return self.step == self.total_steps or self.step % (every or self.steps_per_epoch) == 0
