"""Schedules of beta and of the learning rate: plain functions of the step, so that a resumed run needs no state.

The one schedule with a memory is `Plateau`; its state is a small dictionary that a checkpoint keeps.

Steps count optimiser updates from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lmvae_fast.config import TrainConfig
from lmvae_fast.errors import ConfigError


def cyclical_beta(step: int, total: int, *, beta: float = 1.0, cycles: int = 1, zero: float, increase: float) -> float:
    """Cyclical annealing (Fu et al. 2019, arXiv 1903.10145) with Optimus's stretch at zero.

    A cycle has P = total / cycles steps: 0 for the first zero * P of them, then up linearly by beta / (increase * P) a
    step, starting from 0, then `beta`. Cycle c starts at step floor(c P), also when P is not an integer. Optimus and
    LangVAE 0.6 share this definition; they differ in the shares (configurable; LangVAE fixes .25 and .25) and in what
    `total` is (see `langvae_total_steps`). Past the last step of the run: `beta`.
    """
    if step >= total:
        return beta
    period = total / cycles
    # Cycle c starts at floor(c * period): the last one that starts at or before this step.
    cycle = min(int((step + 1) / period) + 1, cycles - 1)
    while int(cycle * period) > step:
        cycle -= 1
    i = step - int(cycle * period)
    zeros = math.ceil(zero * period)
    if i < zeros:
        return 0.0
    rise = increase * period
    return min(beta * (i - zeros) / rise, beta) if rise > 0 else beta


def langvae_total_steps(sentences: int, batch_size: int, epochs: int) -> int:
    """The step count over which LangVAE 0.6 stretches its beta schedule.

    It adds the remainder of the division, not 1 for the last partial batch, to the batches of an epoch. For parity
    runs only: with it the last cycles may never be reached.
    """
    return epochs * (sentences // batch_size + sentences % batch_size)


def beta_at(step: int, total: int, config: TrainConfig) -> float:
    """The weight of the KL at an optimiser step of a run of `total` steps ("linear" is a cycle as long as the run)."""
    if config.beta_schedule == "constant":
        return config.beta
    cycles = config.beta_cycles if config.beta_schedule == "cyclical" else 1
    return cyclical_beta(
        step, total, beta=config.beta, cycles=cycles, zero=config.beta_zero, increase=config.beta_increase
    )


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


DECAYS: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "plateau": _constant,  # its factor comes from Plateau
}


def learning_rate_factor(step: int, total: int, *, schedule: str, warmup: int = 0) -> float:
    """The factor on the learning rate at a step: (step + 1) / warmup while warming up, then the decay's value.

    The decay runs from the end of the warm-up to the end of the run: at step s it is f((s - warmup) / (total - warmup))
    with f(p) = 1 - p ("linear", Optimus's) or (1 + cos(pi p)) / 2 ("cosine"). The first update of a warm-up is not
    wasted on a rate of zero. Raises ConfigError for an unknown schedule.
    """
    if schedule not in DECAYS:
        raise ConfigError("unknown learning-rate schedule", value=schedule, limit=", ".join(DECAYS))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return DECAYS[schedule](min(max(progress, 0.0), 1.0))


@dataclass
class Plateau:
    """Lower a factor when a figure (smaller is better) stops improving; the rule of torch's ReduceLROnPlateau.

    An evaluation improves when value < best * (1 - threshold) (for a negative best: best * (1 + threshold)). After more
    than `patience` evaluations without that, `scale` is multiplied by `factor`.
    """

    patience: int = 5
    factor: float = 0.5
    threshold: float = 1e-4
    scale: float = 1.0
    best: float | None = None
    waited: int = 0

    def update(self, value: float) -> bool:
        """Take one evaluation's figure; returns whether it improved. NaN never does."""
        improved = improves(value, self.best, self.threshold)
        if improved:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
            if self.waited > self.patience:
                self.scale *= self.factor
                self.waited = 0
        return improved

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over progress; patience, factor and threshold stay those of this object."""
        self.scale, self.best, self.waited = state["scale"], state["best"], state["waited"]


def improves(value: float, best: float | None, threshold: float = 0.0) -> bool:
    """Whether `value` is lower than `best` by the relative threshold; anything finite beats None."""
    if not math.isfinite(value):
        return False
    return best is None or value < best - threshold * abs(best)
