"""The training loop's own step on one batch, to be run again and again: what profiles and benchmarks time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from lmvae_fast.config import TrainConfig
from lmvae_fast.errors import ConfigError
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.training.loop import Trainer


class TrainingStep:
    """Forward, backward, clipping and update of a fixed batch, exactly as ``train`` would run them.

    A context manager: within it, calls are steps. The batch is the first of the plan for ``texts``; features of a frozen
    encoder are computed once, as training does. Files go to ``folder`` (all ranks of a run name the same one), or nowhere.

    Raises what ``train`` raises for a model or sentences that cannot be trained, ConfigError for accumulation (a step is
    one batch here).
    """

    def __init__(self, model: LMVAE, texts: Sequence[str], config: TrainConfig, folder: Path | None = None) -> None:
        if config.accumulation != 1:
            raise ConfigError("a profiled step is one batch", value=f"accumulation={config.accumulation}", limit=1)
        self._folder = None if folder else tempfile.TemporaryDirectory(prefix="lmvae-step-")
        output = str(folder) if self._folder is None else self._folder.name
        quiet = {"progress": False, "tensorboard": False, "resume": False, "cache_dir": None}
        self.trainer = Trainer(model, texts, None, config.replace(output_dir=output, **quiet), ())
        (self.rows,) = self.trainer._batches(0)
        self._prepared = self.trainer.prepared()

    def __enter__(self) -> TrainingStep:
        self._prepared.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._prepared.__exit__(kind, error, trace)
        if self._folder is not None:
            self._folder.cleanup()

    def __call__(self) -> None:
        self.trainer.optimizer_step((self.rows,))

    def batch(self) -> Any:
        """The packed batch of the step, on the model's device."""
        trainer = self.trainer
        return trainer.model.make_batch(trainer.train_set, self.rows, trainer.pooled).to(trainer.device)

    def held_bytes(self) -> int:
        """Bytes that stay between steps: weights (of a frozen encoder too, though no step reads it) and optimizer state."""
        state = self.trainer.state.optimizer.tensors().values()
        return sum(_bytes(t) for t in (*self.trainer.model.parameters(), *state))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
