"""`LanguageTrainingPipeline`: LangVAE's training run, step for step, by our loop."""

from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.files import write_json
from lmvae_fast.integrations.langvae.parts import pooled_labels
from lmvae_fast.integrations.langvae.tokenization import FIELDS, collate_sparse_fn, token_ids
from lmvae_fast.integrations.langvae.trainer_config import plateau_of, train_config
from lmvae_fast.integrations.langvae.vae import LangVAE
from lmvae_fast.text.tokenizer import TokenizedSentences
from lmvae_fast.training.batch_plan import Rows
from lmvae_fast.training.callbacks import Callback
from lmvae_fast.training.checkpoints.tensors import trainable_parameters
from lmvae_fast.training.loop import Trainer
from lmvae_fast.training.records import Record, TrainResult
from lmvae_fast.training.run_checks import writing_run
from lmvae_fast.training.schedule import cyclical_beta, langvae_total_steps

logger = logging.getLogger(__name__)


class LanguageTrainingPipeline:
    """Trains a LangVAE: ``pipeline(train_data, eval_data, callbacks)``.

    Batches, the weight of the KL, the learning rate and what becomes the final model are those of LangVAE 0.6.13; the steps are
    our loop's, which saves after every epoch. The folder ``<output_dir>/VAE_training_<time>`` gets ``final_model`` and the
    checkpoints asked for, in LangVAE's format, ``training_config.json`` and ``metrics.jsonl``.

    Args:
        model: a :class:`~lmvae_fast.integrations.langvae.LangVAE`.
        training_config: a ``CyclicalScheduleKLThresholdTrainerConfig``, ours or the original's; the two in either order.

    Attributes:
        training_dir: folder of the last run. result: its :class:`~lmvae_fast.training.records.TrainResult`.

    Raises:
        ConfigError: another model, or a configuration that cannot be honoured.
    """

    def __init__(self, model: Any = None, training_config: Any = None):
        if isinstance(training_config, LangVAE):
            model, training_config = training_config, model
        if not isinstance(model, LangVAE):
            raise ConfigError(
                "model must be a LangVAE of lmvae_fast.integrations.langvae",
                value=f"{type(model).__module__}.{type(model).__qualname__}",
                remedy="build it with these classes; lf.train trains an LMVAE",
            )
        missing = [name for name in ("max_beta", "n_cycles", "target_kl") if not hasattr(training_config, name)]
        if missing:
            raise ConfigError(
                "training_config must be a CyclicalScheduleKLThresholdTrainerConfig",
                value=type(training_config).__name__,
            )
        train_config(training_config, Path("unused"))
        self.training_config, self.model = training_config, model
        self.training_dir: Path | None = None
        self.result: TrainResult | None = None

    def __call__(self, train_data: Any, eval_data: Any = None, callbacks: Sequence[Any] | None = None) -> None:
        """Train. train_data, eval_data: TokenizedDataSet, or any dataset whose rows have such a ``data``. callbacks: pythae's.

        Raises what :func:`lmvae_fast.train` raises.
        """
        config, model = self.training_config, self.model
        train_set, columns = sentences_of(train_data, model, config.per_device_train_batch_size)
        engine = model.engine_for(columns)
        eval_set = None
        if eval_data is not None:
            eval_set, _ = sentences_of(eval_data, model, config.per_device_eval_batch_size)
        stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        folder = Path(config.output_dir or "dummy_output_dir") / f"{model.model_name}_training_{stamp}"
        ours = train_config(config, folder)
        model.target_kl = config.target_kl
        model.to("cuda" if torch.cuda.is_available() and not config.no_cuda else "cpu")
        with writing_run(folder, True):
            write_json(folder / "training_config.json", _plain(config))
            epochs = _Epochs(config, model, [c() if isinstance(c, type) else c for c in callbacks or ()], folder)
            trainer = _ReleasedTrainer(engine, train_set, eval_set, ours, [epochs])
            trainer.released = config
            self.training_dir, self.result = folder, trainer.run()
            epochs.write_final()
        model.cur_beta = float(engine.beta)


class _ReleasedTrainer(Trainer):
    """The loop with LangVAE 0.6.13's batches and weight of the KL."""

    released: Any

    def _batches(self, step: int) -> tuple[Rows, ...]:
        size, count = self.config.batch_size, len(self.train_set)
        start = step % self.steps_per_epoch * size
        return (np.arange(start, min(start + size, count)),)

    def beta(self) -> float:
        # LangVAE counts an epoch's batches as N // B + N % B, and jumps to its next multiple with each epoch.
        count, config = len(self.train_set), self.config
        total = langvae_total_steps(count, config.batch_size, config.epochs)
        epoch, batch = divmod(self.step, self.steps_per_epoch)
        step = epoch * (total // config.epochs) + batch
        return cyclical_beta(step, total, beta=config.beta, cycles=config.beta_cycles, zero=0.25, increase=0.25)


class _Epochs(Callback):
    """What LangVAE does around its epochs: callbacks, the plateau, the best model, checkpoints."""

    def __init__(self, config: Any, model: LangVAE, callbacks: list[Any], folder: Path):
        self.config, self.model, self.callbacks, self.folder = config, model, callbacks, folder
        self.plateau = plateau_of(config) is not None
        self.losses: list[float] = []
        self.best: tuple[float, dict[str, Tensor]] = (math.inf, {})
        self.evaluated: float | None = None

    def tell(self, event: str, **known: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.config, model=self.model, **known)

    def on_train_begin(self, run: Any) -> None:
        self.tell("on_train_begin", model_config=self.model.model_config)
        self._begin(run, 1)

    def _begin(self, run: Any, epoch: int) -> None:
        loader = range(run.steps_per_epoch)
        evaluation = None if run.eval_set is None else range(1)
        self.tell("on_epoch_begin", epoch=epoch, train_loader=loader, eval_loader=evaluation)
        self.tell("on_train_step_begin", train_loader=loader, epoch=epoch, rank=-1)

    def on_step(self, run: Any) -> None:
        self.tell("on_train_step_end")

    def on_log(self, run: Any, record: Record) -> None:
        self.losses.append(record["loss"])
        if run.step % run.steps_per_epoch == 0 and run.eval_set is None:
            self._end(run, None)

    def on_evaluate(self, run: Any, record: Record) -> None:
        self.tell("on_eval_step_begin", eval_loader=range(1), epoch=run.epoch + 1, rank=-1)
        self.tell("on_eval_step_end")
        self._end(run, record["loss"])

    def _end(self, run: Any, evaluated: float | None) -> None:
        """After an epoch's steps and its evaluation."""
        loss, epoch = sum(self.losses) / len(self.losses), run.epoch + 1
        self.losses = []
        if self.plateau:
            run.state.plateau.update(loss if evaluated is None else evaluated)
        by_train = self.config.keep_best_on_train or evaluated is None
        value = loss if by_train else evaluated
        if value is not None and value < self.best[0]:
            state = {name: p.detach().to("cpu", copy=True) for name, p in trainable_parameters(run.model).items()}
            self.best = (value, state)
        self.tell("on_epoch_end")
        if self.config.steps_saving is not None and epoch % self.config.steps_saving == 0:
            self._write(self.folder / f"checkpoint_epoch_{epoch}")
            self.tell("on_save")
        logs = {"train_epoch_loss": loss}
        if evaluated is not None:
            logs["eval_epoch_loss"] = evaluated
        self.tell("on_log", logs=logs, logger=logger, global_step=epoch, rank=-1)
        if run.step < run.total_steps:
            self._begin(run, epoch + 1)

    def on_train_end(self, run: Any, result: TrainResult | None) -> None:
        if result is not None:
            self.tell("on_train_end")

    def write_final(self) -> None:
        """The best model, or, of a run that was stopped before its first epoch ended, the model as it is."""
        self._write(self.folder / "final_model")

    def _write(self, folder: Path) -> None:
        """Save the best model; the one that trains keeps its weights."""
        engine, best = self.model.lmvae, self.best[1]
        now = {name: p.detach().clone() for name, p in trainable_parameters(engine).items()} if best else {}
        try:
            if best:
                engine.load_trainable_state_dict(best)
            self.model.save(folder)
        finally:
            if now:
                engine.load_trainable_state_dict(now)


def sentences_of(data: Any, model: LangVAE, batch_size: int) -> tuple[TokenizedSentences, dict[str, int]]:
    """A dataset's sentences as ours, and the kinds of annotation it has with their numbers of labels.

    Labels are pooled over as many places as the longest sentence of each batch of ``batch_size`` has, as LangVAE pools them.
    Raises DataError for rows without tokens, or a dataset that is none.
    """
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or not len(data):
        raise DataError(
            "data must be a dataset with rows", value=type(data).__name__, limit="TokenizedDataSet, or its like",
            remedy="TokenizedDataSet(sentences, decoder.tokenizer, decoder.max_len)",
        )  # fmt: skip
    tokenizer = model.decoder.tokenizer
    ids: list[list[int]] = []
    pooled: list[Tensor] = []
    columns: dict[str, int] = {}
    for start in range(0, len(data), batch_size):
        rows = [data[row] for row in range(start, min(start + batch_size, len(data)))]
        if not all(hasattr(row, "keys") and "data" in row for row in rows):
            raise DataError(
                "a row of the dataset has no 'data'", value=f"rows {start} and on", remedy="TokenizedDataSet"
            )
        batch = collate_sparse_fn(rows)
        found, places = token_ids(batch["data"], tokenizer.pad_token_id)
        ids += found
        labels = {name: batch[name] for name in batch if name not in FIELDS}
        columns = {name: value.shape[-1] for name, value in labels.items()}
        if labels:
            pooled.append(torch.cat(pooled_labels(labels, places, torch.device("cpu")), -1))
    longest = max(map(len, ids))
    if longest > model.decoder.max_len:
        raise DataError(
            "sentences are longer than the decoder was made for", value=f"{longest} tokens", limit=model.decoder.max_len,
            remedy="give the dataset the decoder's max_len",
        )  # fmt: skip
    empty = [row for row, sentence in enumerate(ids) if not sentence]
    if empty:
        raise DataError(f"row {empty[0]} has no tokens", remedy="leave it out")
    spelled = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    texts = [text.strip() for text in spelled]
    annotations = torch.cat(pooled) if pooled else None
    return TokenizedSentences(texts, spelled, ids, annotations, list(range(len(ids)))), columns


def _plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON takes it."""
    values = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))
    return {name: value for name, value in values.items() if not name.startswith("_")}
