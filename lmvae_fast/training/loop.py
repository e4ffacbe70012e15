"""The training loop.

Order within a step: batches, backward, clip, update; then, where due, log, evaluate, save. A checkpoint therefore holds
everything up to and including its step, and a resumed run begins with the next one.

A resumed run equals an unbroken one bit for bit on one device when the ops are deterministic (they are on CPU) and the
number of threads is the same, because a sum split over other threads rounds differently.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.config import TrainConfig
from lmvae_fast.errors import NumericalError
from lmvae_fast.evaluation.collapse import warn_of_collapse
from lmvae_fast.memory import memory_guard
from lmvae_fast.models.decoder.training_body import TrainingBody, trained_through
from lmvae_fast.signals import StopSignals
from lmvae_fast.training.batch_plan import EpochPlan, Rows, bounds_of, groups_of, plan_epoch, steps_per_epoch
from lmvae_fast.training.callbacks import Callback
from lmvae_fast.training.checkpoints import folder as checkpoint
from lmvae_fast.training.checkpoints import identity, run_state
from lmvae_fast.training.checkpoints.tensors import seed_all, trainable_parameters
from lmvae_fast.training.distributed import Ranks, noticing_lost_ranks
from lmvae_fast.training.feature_cache import TensorCache, encoder_fingerprint, pooled_features, tokenized_sentences
from lmvae_fast.training.optimizer import Optimizer
from lmvae_fast.training.posterior_start import start_posterior
from lmvae_fast.training.recorded_steps import RecordedSteps, StepInputs, capture_of, moved, reason_against
from lmvae_fast.training.records import Progress, Record, TrainResult
from lmvae_fast.training.run import RunLoop
from lmvae_fast.training.run_checks import check_run, writing_run
from lmvae_fast.training.running_means import RunningMeans
from lmvae_fast.training.schedule import Plateau, beta_at, improves, learning_rate_factor
from lmvae_fast.training.sharding import shard_decoder
from lmvae_fast.training.step_setup import compiling, frozen_in, keeping_freed_memory, recomputing
from lmvae_fast.training.stopping import FiniteWatch
from lmvae_fast.training.validation import validate

_LESS_AT_ONCE = "lower batch_size and raise accumulation as much, set recompute_decoder=True, or precision='bf16'"
_LESS_THAT_TRAINS = "lower latent_dim or slots, or train less (decoder_part='lora')"
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    model: Any,
    train_data: Any,
    eval_data: Any = None,
    config: TrainConfig | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train what the model trains, in place, on the device the model is on.

    model: an LMVAE. train_data, eval_data: what `model.tokenize` takes (strings, Examples, a SentenceDataset) or its
    result. Seeds torch's, numpy's and Python's global generators with config.seed. Writes checkpoints, `metrics.jsonl`
    and TensorBoard files below config.output_dir, which must be empty or a run's. Ctrl-C, SIGTERM and SIGHUP finish the step,
    save, and return with `stop_reason` set to the signal.

    Raises: ConfigError, DataError (nothing to train on), OutputError (folder unwritable or full, holding anything that
    is no run, or being trained into by another process; before the first step where it can be known, and otherwise with the
    earlier checkpoints whole), CheckpointError (resume),
    NumericalError (NaN or infinity: names the step, the dataset rows and the last good checkpoint; carries them as
    `step`, `rows` and `checkpoint`).
    """
    config = config or TrainConfig()
    with writing_run(Path(config.output_dir), Ranks().first):
        return Trainer(model, train_data, eval_data, config, callbacks).run()


class Trainer(RunLoop[TrainResult]):
    """One run of `train`, its only caller."""

    def __init__(
        self, model: Any, train_data: Any, eval_data: Any, config: TrainConfig, callbacks: Sequence[Callback]
    ) -> None:
        self.ranks = Ranks()
        super().__init__(config, callbacks, watched=self.ranks.first)
        self.model = model
        self.body: TrainingBody | None = None  # of the frozen decoder, within `prepared`
        self.device = next(model.parameters()).device
        self.parameters = trainable_parameters(model)
        check_run(model, self.parameters, config, self.ranks, eval_data)
        if self.ranks.first:
            checkpoint.check_space(self.folder, model.trainable_state_dict(), config.keep_checkpoints)
        found = identity.find(config, self.folder)

        self.ranks.wait(until_first_is_done=True)  # what it computes the others read from the cache
        cache = TensorCache(Path(config.cache_dir) if config.cache_dir else self.output_dir / "cache")
        self.train_set = tokenized_sentences(model, train_data, cache, on_long=config.on_long)
        self.eval_set = None
        if eval_data is not None:
            self.eval_set = tokenized_sentences(model, eval_data, cache, on_long=config.on_long)
        self.eval_batch = config.eval_batch_size or config.batch_size
        encoder = encoder_fingerprint(model)
        self.pooled = pooled_features(model, self.train_set, encoder, cache, batch_size=self.eval_batch)
        self.eval_pooled = None
        if self.eval_set is not None:
            self.eval_pooled = pooled_features(model, self.eval_set, encoder, cache, batch_size=self.eval_batch)
        self.ranks.wait(until_first_is_done=False)

        self.groups = groups_of(self.train_set, config.batch_size)
        self.steps_per_epoch = steps_per_epoch(len(self.train_set), config.batch_size, config.accumulation, self.groups)
        self.total_steps = config.max_steps or config.epochs * self.steps_per_epoch
        self.watch = FiniteWatch(self.device)
        # On the CPU this costs nothing and finds the weights still good; on a GPU it would stall every step, so there
        # the record is read where figures are read anyway: at log steps and before a checkpoint is written.
        self.check_every_step = self.device.type == "cpu"
        self._plan: tuple[int, EpochPlan] | None = None
        pooled, grouped = self.pooled is not None, self.groups is not None
        against = partial(reason_against, model, config, self.ranks, pooled=pooled, grouped=grouped)
        capture = capture_of(self.device, config.cuda_graphs, against)
        self.recorded: RecordedSteps | None = None
        if capture is not None:
            self.recorded = RecordedSteps(
                self._step_over, lambda: moved(self.state, self.watch), capture, int(model.config.max_len)
            )

        eval_print = None if self.eval_set is None else self.eval_set.fingerprint()
        known = identity.identity(config, model, self.train_set.fingerprint(), eval_print)
        self.ranks.agree(known)
        seed_all(config.seed + self.ranks.rank)  # of dropout inside fine-tuned modules; rank 0 draws the seeds of steps
        start_posterior(model, self.train_set, self.pooled)
        self.ranks.broadcast(self.parameters.values())
        if config.shard:  # after its weights have been compared
            shard_decoder(model.decoder, self.ranks, AUTOCAST.get(config.precision))
            self.parameters = trainable_parameters(model)
        self.state = run_state.RunState(
            model,
            self.parameters,
            Optimizer(model, self.parameters, config, self.ranks, recorded=self.recorded is not None),
            Plateau(config.plateau_patience, config.plateau_factor),
            RunningMeans(self.device, self.ranks),
            Progress(),
            identity=known,
            device=self.device,
            ranks=self.ranks,
        )
        if found is not None:
            run_state.restore(self.state, found, self.folder)
            self.last_checkpoint = found.path

    @property
    def progress(self) -> Progress:
        """How far it has come."""
        return self.state.progress

    def surroundings(self) -> contextlib.AbstractContextManager[Any]:
        """A rank that is lost ends the others."""
        return noticing_lost_ranks()

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """The state in which steps are taken; what it sets up is given back at its end."""
        dtype = AUTOCAST.get(self.config.precision)
        decoder = self.model.train().decoder
        with (
            frozen_in(decoder, dtype),
            recomputing(decoder, self.config.recompute_decoder),
            compiling(decoder, self.config.compile),
            trained_through(decoder, not self.config.compile) as self.body,
            keeping_freed_memory(self.device),
            self.state.optimizer.attached(),
        ):
            try:
                yield
            finally:
                if self.recorded is not None:  # its recordings read the weights in the precision they have here
                    self.recorded.forget()

    def _advance(self, signals: StopSignals) -> None:
        """One step and all that is due after it."""
        config = self.config
        started = time.perf_counter()
        self.optimizer_step(self._batches(self.step))
        self.state.progress.step += 1
        elapsed = time.perf_counter() - started
        self.state.progress.seconds += elapsed
        self.state.means.seconds += elapsed
        self.tell("on_step")
        last = self.step == self.total_steps

        if self.is_due(config.log_every):
            self._log()
        if self.eval_set is not None and self.is_due(config.eval_every):
            self._evaluate()
        stop = self.ranks.any_stop(self.stop_reason or signals.received)
        if stop is not None and not last:
            self.request_stop(stop)
        best = self.state.progress.best
        improved = config.keep_best and best is not None and best["step"] == self.step
        if self.is_due(config.save_every) or improved or self.stop_reason is not None:
            self._stop_if_not_finite()
            self.last_checkpoint = run_state.save(self.state, self.folder, keep=config.keep_checkpoints)
            self.tell("on_checkpoint", self.last_checkpoint)

    def _batches(self, step: int) -> tuple[Rows, ...]:
        """The micro-batches (rows of the tokenised set) of a step."""
        config, epoch = self.config, step // self.steps_per_epoch
        if self._plan is None or self._plan[0] != epoch:
            plan = plan_epoch(
                self.train_set.lengths,
                config.batch_size,
                seed=config.seed,
                epoch=epoch,
                accumulation=config.accumulation,
                bucket_batches=config.bucket_batches,
                groups=self.groups,
            )
            self._plan = (epoch, plan)
        return self._plan[1].steps[step % self.steps_per_epoch]

    def beta(self) -> float:
        """Weight of the KL at the coming step."""
        return beta_at(self.step, self.total_steps, self.config)

    def _learning_rate(self) -> float:
        config = self.config
        factor = learning_rate_factor(self.step, self.total_steps, schedule=config.schedule, warmup=config.warmup_steps)
        return config.learning_rate * factor * self.state.plateau.scale

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = AUTOCAST.get(self.config.precision)
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()

    def optimizer_step(self, micro_batches: tuple[Rows, ...]) -> None:
        """One step on these rows of the tokenised training set, within `prepared`."""
        beta = self.model.beta = self.beta()
        self.state.optimizer.learning_rate = self._learning_rate()
        if self.recorded is not None:
            self._recorded_step(self.recorded, micro_batches[0], beta)
            return
        sentences = sum(len(rows) for rows in micro_batches)
        # Memory for the step's longest sentence and its end token: alike in all micro-batches.
        tokens = 1 + max(len(self.train_set.ids[row]) for rows in micro_batches for row in rows)
        for i, rows in enumerate(micro_batches):
            share = self.ranks.share(len(rows), bounds_of(self.train_set, rows))
            own = rows if share is None else rows[share.rows]
            batch = self.model.make_batch(self.train_set, own, self.pooled).to(self.device)
            batch.share = share
            # From torch's CPU generator: its state is in the checkpoint, and reading it costs the device nothing.
            seed = self.ranks.same(int(torch.randint(2**62, ())))
            counted = len(rows) if share is None else share.count
            with self._memory(
                f"forward and backward of {len(own)} sentences with {batch.num_tokens} tokens", _LESS_AT_ONCE
            ):
                with self._autocast():
                    out = self.model(batch, beta=beta, seed=seed, tokens=tokens)
                self.watch.note(out.loss, self._position(i))
                # The model's loss is a mean over its sentences; weighting by them makes k micro-batches exactly one batch.
                self.state.optimizer.scaler.scale(out.loss * (counted / sentences)).backward()
            self.state.progress.sentences += len(rows)
            if counted:
                self.state.means.add(out, batch)
                self.state.means.count(sentences=batch.batch_size, tokens=batch.num_tokens)
                self.state.progress.tokens += batch.num_tokens
        self.state.optimizer.synchronize(self.ranks)
        norm = self.state.optimizer.norm()
        # With a scaler an infinite norm is how it finds its scale: it skips the step.
        if not self.state.optimizer.scaler.is_enabled():
            self.watch.note(norm, self._position(self.config.accumulation))
        if self.check_every_step:
            self._stop_if_not_finite()
        self.state.means.add_step(norm)
        self.state.means.count(steps=1)
        count = sum(parameter.numel() for parameter in self.parameters.values())
        held = f"the optimizer, which holds two moments for each of {count:,} parameters"
        with self._memory(held, _LESS_THAT_TRAINS):
            self.state.optimizer.step(norm)

    def _recorded_step(self, recorded: RecordedSteps, rows: Rows, beta: float) -> None:
        """As `optimizer_step` of one batch, by recordings."""
        if self.body is not None and self.body.stale():
            recorded.forget()  # the first batch of a size is then run, which prepares the layers anew
        batch = self.model.make_batch(self.train_set, rows, self.pooled)
        seed = int(torch.randint(2**62, ()))
        with self._memory(f"a step of {batch.batch_size} sentences with {batch.num_tokens} tokens", _LESS_AT_ONCE):
            recorded(batch, self.device, seed=seed, position=self._position(0), beta=beta)
        self.state.means.count(sentences=batch.batch_size, tokens=batch.num_tokens, steps=1)
        self.state.progress.sentences += batch.batch_size
        self.state.progress.tokens += batch.num_tokens
        if self.check_every_step:
            self._stop_if_not_finite()

    def _step_over(self, inputs: StepInputs, beta: float | Tensor) -> None:
        """All that a step does on the device."""
        batch = inputs.batch()
        with self._autocast():
            out = self.model(batch, beta=beta, seed=inputs.seed, tokens=inputs.size.longest)
        self.watch.note(out.loss, inputs.position)
        out.loss.backward()
        self.state.means.add(out, batch)
        norm = self.state.optimizer.norm()
        self.watch.note(norm, inputs.position + 1)
        self.state.means.add_step(norm)
        self.state.optimizer.step(norm)

    def _memory(self, what: str, remedy: str) -> contextlib.AbstractContextManager[None]:
        kept = self.last_checkpoint or "none yet"
        return memory_guard(what, f"{remedy}; the last checkpoint is {kept}: go on from it with resume")

    def _position(self, part: int) -> int:
        """A number for each figure that is watched: the losses of a step's micro-batches, then its gradient norm."""
        return self.step * (self.config.accumulation + 1) + part

    def _stop_if_not_finite(self) -> None:
        position = self.watch.first()
        if position is None:
            return
        step, part = divmod(position, self.config.accumulation + 1)
        batches = self._batches(step)
        if part < self.config.accumulation:
            kind, batches = "loss", batches[part : part + 1]
        else:
            kind = "gradient norm"
        rows: list[int] = []
        for batch in batches:
            rows += self.model.make_batch(self.train_set, batch, self.pooled).indices.tolist()
        error = NumericalError(
            f"the {kind} of step {step + 1} is NaN or infinite",
            value=f"dataset rows {rows}",
            limit="finite figures",
            remedy=f"look at these rows; lower learning_rate or grad_clip, or use precision='fp32'; the last good "
            f"checkpoint is {self.last_checkpoint or 'none yet'}",
        )
        error.step, error.rows, error.checkpoint = step + 1, rows, self.last_checkpoint
        raise error

    def _log(self) -> None:
        self._stop_if_not_finite()
        record: Record = {
            "kind": "train",
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            **self.state.means.means(),
            "beta": self.model.beta,
            "learning_rate": self.state.optimizer.learning_rate,
            "seconds": self.state.progress.seconds,
        }
        self.state.means.reset({})
        self.tell("on_log", record)

    def _evaluate(self) -> None:
        figures = validate(
            self.model,
            self.eval_set,
            self.eval_pooled,
            batch_size=self.eval_batch,
            beta=self.model.beta,
            seed=self.config.seed,
            autocast=self._autocast,
            ranks=self.ranks,
        )
        figures = self.ranks.same(figures)  # rank 0's word: what follows from them must follow on every rank
        # Smaller is better for all but the ELBO.
        value = -figures["elbo"] if self.config.monitor == "elbo" else figures[self.config.monitor]
        best = self.state.progress.best
        improved = improves(value, None if best is None else best["monitored"])
        record: Record = {
            "kind": "eval",
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            **figures,
            "beta": self.model.beta,
            "monitored": value,
            "improved": improved,
        }
        self.state.progress.waited = 0 if improved else self.state.progress.waited + 1
        if improved:
            self.state.progress.best = record
        if self.config.schedule == "plateau":
            self.state.plateau.update(value)
        if self.config.early_stop is not None and self.state.progress.waited >= self.config.early_stop:
            self.request_stop("early_stop")
        ends = self.step == self.total_steps or self.stop_reason is not None
        if ends and self.ranks.first and self.model.config.latent_dim:
            warn_of_collapse(figures["kl"], figures["active_units"], self.model.config.latent_dim, "training ends, and")
        self.tell("on_evaluate", record)

    def _result(self) -> TrainResult:
        best = self.state.progress.best
        return TrainResult(
            stop_reason=self.stop_reason or "completed",
            history=self.log.history,
            best=best,
            checkpoint=self.last_checkpoint,
            best_checkpoint=None if best is None else checkpoint.of_step(self.folder, best["step"]),
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            seconds=self.state.progress.seconds,
            sentences=self.state.progress.sentences,
            tokens=self.state.tokens_of_all(),
        )
