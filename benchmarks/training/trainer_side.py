"""What sides of comparisons share that take the training loop's own steps."""

from __future__ import annotations

import contextlib

from lmvae_fast.training.loop import Trainer


class TrainerSide:
    """A trainer whose steps are taken one by one, as a run takes them: with all that it prepares, from the first one on."""

    def holds(self, trainer: Trainer) -> None:
        """Before anything else: whose steps they are."""
        self.trainer = trainer
        self.rows, self.held, self.stepping = trainer._batches(0), contextlib.ExitStack(), False

    def prepare(self) -> None:
        """What a run sets up before its first step."""
        if not self.stepping:
            self.held.enter_context(self.trainer.prepared())
            self.stepping = True

    def step(self) -> dict:
        """One training step."""
        self.prepare()
        self.trainer.optimizer_step(self.rows)
        return {}
