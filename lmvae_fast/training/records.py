"""What a run records on its way, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmvae_fast.signals import USUAL

#: A flat dictionary with `kind` ("train" or "eval"), `step`, `epoch` and figures, all plain numbers.
Record = dict[str, Any]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        stop_reason: "completed", "early_stop", the name of a signal ("SIGINT", "SIGTERM") or a callback's reason.
        history: every record of `metrics.jsonl`: training means and evaluations, also of the parts before a resume.
        best: the best evaluation's record, or None without evaluation data.
        checkpoint: the last checkpoint's folder. best_checkpoint: that of the best evaluation, if it was saved.
        step, epoch: where the run stands (epoch as a fraction).
        seconds, sentences, tokens: training time (also before a resume) and what was processed in it.
    """

    stop_reason: str
    history: list[Record]
    best: Record | None
    checkpoint: Path | None
    best_checkpoint: Path | None
    step: int
    epoch: float
    seconds: float
    sentences: int
    tokens: int

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run; `resume=True` continues it."""
        return self.stop_reason in [number.name for number in USUAL]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class FlowResult:
    """How a fit ended.

    Attributes:
        stop_reason: "completed", "early_stop", the name of a signal, or a callback's reason.
        history: every record of `metrics.jsonl`. best: the best evaluation's record, or None without validation pairs.
        checkpoint: the last checkpoint's folder. step, epoch: where the run stands. seconds, pairs: of all of it.
        skipped: definitions of the training part whose word has no vector.
    """

    stop_reason: str
    history: list[Record]
    best: Record | None
    checkpoint: Path | None
    step: int
    epoch: float
    seconds: float
    pairs: int
    skipped: int = 0

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run; `resume=True` continues it."""
        return self.stop_reason in [number.name for number in USUAL]


@dataclass
class Progress:
    """The part of a run's state that is plain numbers; saved as JSON."""

    step: int = 0
    seconds: float = 0.0
    sentences: int = 0
    tokens: int = 0
    best: Record | None = None
    waited: int = 0
    window: dict[str, float] = field(default_factory=dict)
