"""Means of a run's figures since its last record."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmvae_fast.evaluation.elbo import elbo_terms
from lmvae_fast.training.distributed import Ranks


class RunningMeans:
    """Sums since the last log record, kept on the device until they are read."""

    NAMES = ("loss", "reconstruction", "kl", "grad_norm")

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self.device, self.ranks = device, ranks
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.reset({})

    def reset(self, saved: dict[str, float]) -> None:
        # In place: recorded steps add to this very tensor.
        self.sums.copy_(torch.tensor([saved.get(name, 0.0) for name in self.NAMES], dtype=torch.float64))
        self.sentences, self.tokens, self.steps = (int(saved.get(n, 0)) for n in ("sentences", "tokens", "steps"))
        self.seconds = saved.get("seconds", 0.0)

    def add(self, out: Any, batch: Any) -> None:
        """A batch's figures, on the device alone; `count` has the numbers that the host knows."""
        loss = out.loss.detach().double() * batch.counted
        self.sums[:3] += torch.stack([loss, *elbo_terms(out, batch)])

    def count(self, *, sentences: int = 0, tokens: int = 0, steps: int = 0) -> None:
        """What the figures added are of."""
        self.sentences += sentences
        self.tokens += tokens
        self.steps += steps

    def add_step(self, grad_norm: Tensor) -> None:
        """A step's gradient norm, on the device alone."""
        # A step that the fp16 scaler skips has an infinite norm; it is not part of the mean.
        self.sums[3] += torch.where(torch.isfinite(grad_norm), grad_norm, 0.0)

    def means(self) -> dict[str, float]:
        """Means per sentence (the gradient norm: per step) and the rate, as numbers (synchronises)."""
        sums = self.read()
        sentences = sums["sentences"]
        reconstruction, kl = sums["reconstruction"] / sentences, sums["kl"] / sentences
        return {
            "loss": sums["loss"] / sentences,
            "reconstruction": reconstruction,
            "kl": kl,
            "elbo": -(reconstruction + kl),
            "grad_norm": sums["grad_norm"] / self.steps,
            "tokens_per_second": sums["tokens"] / max(self.seconds, 1e-9),
        }

    def read(self) -> dict[str, float]:
        """All sums as numbers, over all ranks (synchronises)."""
        counts = {"sentences": self.sentences, "tokens": self.tokens, "steps": self.steps, "seconds": self.seconds}
        own = dict(zip(self.NAMES, self.sums.tolist(), strict=True)) | counts
        return self.ranks.total(own, common=("grad_norm", "steps", "seconds"))
