"""What can watch a training run: the protocol, and the three watchers that come with it.

A record is a flat dictionary with `kind` ("train" or "eval"), `step`, `epoch` and figures. All are plain numbers: the
one transfer from the device has happened before a callback sees them.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import Any, ClassVar, Protocol

from lmvae_fast.data.lines import decoded_lines, open_file
from lmvae_fast.documents import parse_json
from lmvae_fast.errors import DataError
from lmvae_fast.files import output_errors, replacing
from lmvae_fast.training.records import Record, TrainResult

#: Label on a progress bar -> (figure of a record, its format).
Shown = dict[str, tuple[str, str]]


class Run(Protocol):
    """What a callback sees of the run: read it freely, change it only through `request_stop`."""

    model: Any
    config: Any
    output_dir: Path
    step: int
    total_steps: int

    @property
    def epoch(self) -> int: ...

    def request_stop(self, reason: str) -> None:
        """End the run in order after this step: a checkpoint is written and `TrainResult.stop_reason` is `reason`."""


class Callback:
    """Base class of callbacks: override what you need. An exception raised in one ends the run."""

    def on_train_begin(self, run: Run) -> None:
        """Before the first step; after a resume, `run.step` is the step resumed at."""

    def on_step(self, run: Run) -> None:
        """After every optimizer step. Reading a tensor's value here would stall the device at each step."""

    def on_log(self, run: Run, record: Record) -> None:
        """Every `log_every` steps: means since the last record."""

    def on_evaluate(self, run: Run, record: Record) -> None:
        """After each evaluation; `record["improved"]` says whether it is the best so far."""

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """After a checkpoint has become complete."""

    def on_train_end(self, run: Run, result: TrainResult | None) -> None:
        """At the end; `result` is None when the run ends by an exception."""


class MetricsLog(Callback):
    """Every record as a line of `metrics.jsonl` in the output folder; the history of a run, kept through resumes.

    A resumed run first drops the records after its checkpoint (and a line that a kill cut short), so the file reads as
    if the run had never been interrupted. Where there is no checkpoint to resume, the records are kept aside.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history: list[Record] = []

    def on_train_begin(self, run: Run) -> None:
        if not run.step and self.path.is_file() and self.path.stat().st_size:
            with output_errors(self.path):
                os.replace(self.path, self.path.with_name(f"aside-{self.path.name}"))
        self.history = [record for record in read_records(self.path) if run.step and record["step"] <= run.step]
        with replacing(self.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in self.history)
            file.flush()
            os.fsync(file.fileno())

    def _append(self, record: Record) -> None:
        self.history.append(record)
        with output_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def on_log(self, run: Run, record: Record) -> None:
        self._append(record)

    def on_evaluate(self, run: Run, record: Record) -> None:
        self._append(record)


def read_records(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`, up to the first line that is not whole; [] if there is no file."""
    records: list[Record] = []
    if not path.is_file():
        return records
    with open_file(path) as file:
        try:
            for number, line in decoded_lines(file, path):
                record = parse_json(line, f"{path} line {number}")
                if not is_record(record):
                    break
                records.append(record)
        except DataError:  # a line that a kill cut short, or that something else wrote
            pass
    return records


def is_record(record: Any) -> bool:
    """Whether a value is a record of a run: its step a whole number, its figures numbers."""
    return (
        isinstance(record, dict)
        and type(record.get("step")) is int
        and record["step"] >= 0
        and record.get("kind") in ("train", "eval")
        and all(isinstance(value, (int, float, str, bool, type(None))) for value in record.values())
    )


class TensorBoard(Callback):
    """Figures for TensorBoard in `<output_dir>/tensorboard`; without that package, a warning that says so."""

    def __init__(self) -> None:
        self.writer: Any = None

    def on_train_begin(self, run: Run) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            warnings.warn(
                "tensorboard is not installed, so no TensorBoard files are written: pip install 'lmvae_fast[train]', "
                "or set tensorboard=False",
                stacklevel=2,
            )
            return
        # purge_step hides what a killed run wrote after the checkpoint that is resumed.
        self.writer = SummaryWriter(str(run.output_dir / "tensorboard"), purge_step=run.step + 1 if run.step else None)

    def _write(self, record: Record) -> None:
        if self.writer is None:
            return
        for name, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
                self.writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def on_log(self, run: Run, record: Record) -> None:
        self._write(record)

    def on_evaluate(self, run: Run, record: Record) -> None:
        self._write(record)

    def on_checkpoint(self, run: Run, path: Path) -> None:
        if self.writer is not None:
            self.writer.flush()  # what a resume goes on from is then on disk

    def on_train_end(self, run: Run, result: TrainResult | None) -> None:
        if self.writer is not None:
            self.writer.close()


class ProgressBar(Callback):
    """A tqdm bar over optimizer steps with figures of the last records.

    train, evaluation: label on the bar -> (figure of a record, its format); default: ELBO, KL and tokens per second of
    training, ELBO and active units of evaluation.
    """

    TRAIN: ClassVar[Shown] = {
        "elbo": ("elbo", "{:.2f}"), "kl": ("kl", "{:.2f}"), "tok_s": ("tokens_per_second", "{:.0f}"),
    }  # fmt: skip
    EVALUATION: ClassVar[Shown] = {"eval_elbo": ("elbo", "{:.2f}"), "au": ("active_units", "{:.0f}")}

    def __init__(self, train: Shown | None = None, evaluation: Shown | None = None) -> None:
        self.bar: Any = None
        self.train = self.TRAIN if train is None else train
        self.evaluation = self.EVALUATION if evaluation is None else evaluation
        self.figures: dict[str, str] = {}

    def on_train_begin(self, run: Run) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=run.total_steps, initial=run.step, desc="train", unit="step", dynamic_ncols=True)

    def on_step(self, run: Run) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone (SIGHUP), and the step is still to be saved
            self.bar.update(1)

    def on_log(self, run: Run, record: Record) -> None:
        self._show(self.train, record, refresh=False)

    def on_evaluate(self, run: Run, record: Record) -> None:
        self._show(self.evaluation, record, refresh=True)

    def _show(self, shown: Shown, record: Record, *, refresh: bool) -> None:
        self.figures.update({label: form.format(record[name]) for label, (name, form) in shown.items()})
        with contextlib.suppress(OSError):  # as above
            self.bar.set_postfix(self.figures, refresh=refresh)

    def on_train_end(self, run: Run, result: TrainResult | None) -> None:
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.close()
