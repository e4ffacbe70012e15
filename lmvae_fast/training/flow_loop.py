"""Fitting the flow of an Invertible CVAE: AdamW over one flat parameter, with the checkpoints of every other run.

As in `loop.py`, a checkpoint holds everything up to and including its step, and a resumed run begins with the next one and
equals an unbroken one bit for bit (on one device, with as many threads).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.config.flow import FlowConfig, FlowTrainConfig
from lmvae_fast.data.definitions import DefinitionDataset
from lmvae_fast.data.word_vectors import VectorSource, checked_source
from lmvae_fast.errors import ConfigError, DataError, NumericalError
from lmvae_fast.files import fingerprint_tensors
from lmvae_fast.models.flow_files import flow_tensors, load_flow_tensors
from lmvae_fast.models.systems.invertible_cvae import FlowPairs, InvertibleCVAE
from lmvae_fast.models.vae_identity import check_settings, vae_fingerprint, vae_settings, warn_of_unknown_settings
from lmvae_fast.signals import StopSignals
from lmvae_fast.training.callbacks import Callback
from lmvae_fast.training.checkpoints import folder as checkpoint
from lmvae_fast.training.checkpoints import identity
from lmvae_fast.training.checkpoints.run_state import check_state
from lmvae_fast.training.checkpoints.tensors import (
    optimizer_tensors,
    random_tensors,
    restore_optimizer,
    restore_random,
    seed_all,
)
from lmvae_fast.training.feature_cache import TensorCache
from lmvae_fast.training.flow_data import (
    bridged,
    cached_posteriors,
    check_glosses_differ,
    check_not_collapsed,
    flow_figures,
    run_flow,
)
from lmvae_fast.training.records import FlowResult, Progress, Record
from lmvae_fast.training.run import RunLoop
from lmvae_fast.training.run_checks import writing_run
from lmvae_fast.training.schedule import Plateau, improves, learning_rate_factor
from lmvae_fast.training.step_setup import keeping_freed_memory

# On the progress bar: of training, of evaluation.
_SHOWN = (
    {"nll": ("nll", "{:.3f}"), "pairs_s": ("pairs_per_second", "{:.0f}")},
    {"eval_nll": ("nll", "{:.3f}"), "mse": ("mse", "{:.3f}")},
)


def fit_flow(
    model: InvertibleCVAE,
    definitions: DefinitionDataset,
    vectors: VectorSource | None = None,
    *,
    valid: DefinitionDataset | None = None,
    config: FlowTrainConfig | None = None,
    missing: str = "error",
    callbacks: Sequence[Callback] = (),
) -> FlowResult:
    """Fit a model's flow to definitions, in place.

    Args:
        model: its VAE stays as it is.
        definitions: to fit to: the training part of a target set, or all of it (Flow(tr), Flow(all) of arXiv 2312.13208).
        vectors: of the words; default: the model's. The model keeps them.
        valid: definitions whose NLL the run is judged by (early stop, the best flow).
        config: how. missing: a word without a vector: `"error"`, or `"skip"`, which counts it. callbacks: as of `train`.

    A fit starts from its own data: a model that was fitted before gets the bridge and the clusters of these. The posteriors of
    the glosses are computed once and cached below config.output_dir.

    Raises:
        DataError: no definitions, no vectors, a word without one, an empty gloss, glosses that do not differ, or **a collapsed
            VAE**, whose posteriors say nothing of their glosses. ConfigError: widths that do not fit, early_stop or plateau
            without `valid`. OutputError (a folder that holds anything else, or is being written by another process),
            CheckpointError, NumericalError: as of `train`.
    """
    config = FlowTrainConfig() if config is None else config
    if not isinstance(config, FlowTrainConfig):
        raise ConfigError(
            "a flow is fitted by a configuration of its own", value=type(config).__name__, limit="FlowTrainConfig",
            remedy="give lf.FlowTrainConfig(...)",
        )  # fmt: skip
    for part in (definitions, valid):
        if not isinstance(part, DefinitionDataset) and (part is not None or part is definitions):
            raise DataError(
                "a flow is fitted to definitions", value=type(part).__name__, limit="a DefinitionDataset",
                remedy="read them with lf.read_definitions, or collect pairs with DefinitionDataset.from_pairs",
            )  # fmt: skip
    vectors = checked_source(model.vectors if vectors is None else vectors)
    _check_evaluable(config, valid is not None)
    with writing_run(Path(config.output_dir), True):
        return _fit(model, definitions, vectors, valid, config, missing, callbacks)


def _fit(
    model: InvertibleCVAE,
    definitions: DefinitionDataset,
    vectors: VectorSource,
    valid: DefinitionDataset | None,
    config: FlowTrainConfig,
    missing: str,
    callbacks: Sequence[Callback],
) -> FlowResult:
    cache = TensorCache(Path(config.cache_dir) if config.cache_dir else Path(config.output_dir) / "cache")
    print_of_vae = vae_fingerprint(model.vae)
    before = model.bridge, model.clusters, model.centres
    model.bridge, model.clusters, model.centres = None, (), model.centres[:0]
    try:
        parts = [part.with_vectors(vectors, missing=missing) for part in (definitions, valid) if part is not None]
        for kept, found in parts:  # all that can be refused before glosses are encoded, which takes a while
            model.check_pairs(kept, found)
        if model.config.base != "standard":
            check_glosses_differ(parts[0][0].glosses)
        pairs: list[FlowPairs] = []
        for kept, found in parts:
            posterior = cached_posteriors(model, kept.glosses, cache, print_of_vae)
            if not pairs and model.config.base != "standard":
                check_not_collapsed(posterior)
            pairs.append(model.pairs(kept, found, posterior))
        trainer = FlowTrainer(model, pairs[0], pairs[1] if len(pairs) > 1 else None, config, callbacks, print_of_vae)
    except BaseException:
        model.bridge, model.clusters, model.centres = before  # the flow is still that of the fit before
        raise
    model.vectors = vectors
    return replace(trainer.run(), skipped=len(definitions) - len(parts[0][0]))


def _check_evaluable(config: FlowTrainConfig, has_valid: bool) -> None:
    if not has_valid and (config.schedule == "plateau" or config.early_stop is not None):
        raise ConfigError(
            "schedule='plateau' and early_stop go by the NLL of validation definitions", value="valid=None",
            remedy="give valid, for instance definitions.split((0.9, 0.1))",
        )  # fmt: skip


class FlowTrainer(RunLoop[FlowResult]):
    """One fit.

    Args:
        model: an InvertibleCVAE. train, valid: pairs made by it. config, callbacks: of the run.
        vae: fingerprint of the model's VAE; computed if None.
    """

    def __init__(
        self,
        model: InvertibleCVAE,
        train: FlowPairs,
        valid: FlowPairs | None,
        config: FlowTrainConfig,
        callbacks: Sequence[Callback] = (),
        vae: str | None = None,
    ) -> None:
        _check_evaluable(config, valid is not None)
        super().__init__(config, callbacks, shown=_SHOWN)
        self.model = model
        self.device, self.dtype = model.device, model.dtype
        bridge = model.set_width(train.vectors.shape[1])
        checkpoint.check_space(self.folder, {"theta": model.flow.theta}, config.keep_checkpoints)
        found = identity.find(config, self.folder)  # type: ignore[arg-type]
        known = {
            "train_config": config.to_dict(),
            "model_config": {**model.config.to_dict(), "stages": len(model.flow.spec.stages), "bridge": bridge.kind},
            "frozen": vae or vae_fingerprint(model.vae),
            "vae_settings": vae_settings(model.vae),
            "train_data": fingerprint_tensors(train.tensors()),
            "eval_data": None if valid is None else fingerprint_tensors(valid.tensors()),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": self.device.type,
        }
        self.identity = known
        self.train, self.valid = (
            train.to(self.device, self.dtype),
            None if valid is None else valid.to(self.device, self.dtype),
        )
        self.steps_per_epoch = -(-len(train) // config.batch_size)
        self.total_steps = config.max_steps or config.epochs * self.steps_per_epoch
        self.theta = model.flow.theta
        self.optimizer = torch.optim.AdamW(
            [self.theta], lr=config.learning_rate, betas=config.adam_betas, eps=config.adam_eps,
            weight_decay=config.weight_decay, fused=self.device.type in ("cpu", "cuda"),
        )  # fmt: skip
        self.plateau = Plateau(config.plateau_patience, config.plateau_factor)
        self._progress = Progress()
        self.best_theta: Tensor | None = None
        self._order: tuple[int, Tensor] | None = None
        self._reset_window({})
        seed_all(config.seed)
        if found is not None:
            self._restore(found)
        else:
            self._start()

    def _start(self) -> None:
        """The bridge from the distinct words' vectors, and ActNorm from what reaches it."""
        bridge = self.model.bridge
        assert bridge is not None
        bridge.fit(torch.unique(self.train.vectors, dim=0))
        if self.config.initialize:
            self.model.flow.initialize(bridged(self.model, self.train.vectors), self.train.conditions)

    @property
    def progress(self) -> Progress:
        """How far it has come."""
        return self._progress

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """The flow trains; afterwards it is the best one where `keep_best` asks for it."""
        self.model.flow.train()
        with keeping_freed_memory(self.device):
            yield
        if self.config.keep_best and self.best_theta is not None:
            with torch.no_grad():
                self.theta.copy_(self.best_theta)
        self.model.flow.eval()

    def _advance(self, signals: StopSignals) -> None:
        """One step and all that is due after it."""
        config = self.config
        started = time.perf_counter()
        self.optimizer_step(self._rows(self.step))
        self.progress.step += 1
        elapsed = time.perf_counter() - started
        self.progress.seconds += elapsed
        self.window["seconds"] += elapsed
        self.tell("on_step")
        last = self.step == self.total_steps

        if self.is_due(config.log_every):
            self._log()
        if self.valid is not None and self.is_due(config.eval_every):
            self._evaluate()
        stop = self.stop_reason or signals.received
        if stop is not None and not last:
            self.request_stop(stop)
        if self.is_due(config.save_every) or self.stop_reason is not None:
            self._save()

    def _rows(self, step: int) -> Tensor:
        """The pairs of a step: an epoch is a permutation drawn from the seed and the epoch's number."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(((self.config.seed << 32) + epoch) % 2**62)
            order = torch.randperm(len(self.train), generator=generator).to(self.device)
            self._order = (epoch, order)
        size = self.config.batch_size
        return self._order[1][place * size : (place + 1) * size]

    def optimizer_step(self, rows: Tensor) -> None:
        """One step on these pairs."""
        config = self.config
        factor = learning_rate_factor(self.step, self.total_steps, schedule=config.schedule, warmup=config.warmup_steps)
        self.optimizer.param_groups[0]["lr"] = config.learning_rate * factor * self.plateau.scale
        z, logdet, base = run_flow(self.model, self.train, rows)
        loss = base.mean_nll(z, logdet)
        loss.backward()
        grad = self.theta.grad
        assert grad is not None
        norm = grad.dot(grad).sqrt()  # torch's vector_norm has one thread here
        if self.device.type == "cpu" and not (math.isfinite(norm.item()) and math.isfinite(loss.item())):
            self._raise_not_finite(rows)
        if config.grad_clip is not None:
            self._clip(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sums += torch.stack([loss.detach().double() * len(rows), norm.double()])
        self.window["pairs"] += len(rows)
        self.window["steps"] += 1
        self.progress.sentences += len(rows)

    def _clip(self, norm: Tensor) -> None:
        """By the global norm: the fused optimizer divides by what is left here, and no pass of its own is needed."""
        assert self.config.grad_clip is not None
        if self.optimizer.defaults["fused"]:
            self.optimizer.grad_scale = (norm.float() / self.config.grad_clip).clamp_min(1.0)  # type: ignore[attr-defined]
        else:
            torch.nn.utils.clip_grads_with_norm_([self.theta], self.config.grad_clip, norm)

    def _raise_not_finite(self, rows: Tensor | None) -> None:
        known = None if rows is None else rows.tolist()
        at, kind = "" if known is None else f", pairs {known[:20]}", self.model.config.kind
        clamped = ", or take a clamped kind ('allinone', 'glow')" if kind == "coupling" else ", or fewer blocks"
        error = NumericalError(
            f"the loss or gradient at step {self.step + 1} is NaN or infinite", value=f"kind {kind!r}{at}",
            limit="finite figures",
            remedy=f"lower learning_rate or grad_clip{clamped}; the last good checkpoint is "
            f"{self.last_checkpoint or 'none yet'}",
        )  # fmt: skip
        error.step, error.rows, error.checkpoint = self.step + 1, known, self.last_checkpoint
        raise error

    def _reset_window(self, saved: dict[str, float]) -> None:
        self.window = {name: saved.get(name, 0.0) for name in ("pairs", "steps", "seconds")}
        start = [saved.get("loss", 0.0), saved.get("norm", 0.0)]
        self.sums = torch.tensor(start, dtype=torch.float64, device=self.device)

    def _log(self) -> None:
        loss, norm = self.sums.tolist()
        if not torch.isfinite(self.sums).all():
            self._raise_not_finite(None)
        record: Record = {
            "kind": "train", "step": self.step, "epoch": self.step / self.steps_per_epoch,
            "nll": loss / self.window["pairs"], "grad_norm": norm / self.window["steps"],
            "learning_rate": self.optimizer.param_groups[0]["lr"], "seconds": self.progress.seconds,
            "pairs_per_second": self.window["pairs"] / max(self.window["seconds"], 1e-9),
        }  # fmt: skip
        self._reset_window({})
        self.tell("on_log", record)

    def _evaluate(self) -> None:
        assert self.valid is not None
        figures = flow_figures(self.model, self.valid, seed=self.config.seed)
        value, best = figures["nll"], self.progress.best
        if value != value:
            self._raise_not_finite(None)
        improved = improves(value, None if best is None else best["monitored"])
        record: Record = {
            "kind": "eval", "step": self.step, "epoch": self.step / self.steps_per_epoch, **figures,
            "monitored": value, "improved": improved,
        }  # fmt: skip
        self.progress.waited = 0 if improved else self.progress.waited + 1
        if improved:
            self.progress.best = record
            self.best_theta = self.theta.detach().clone()
        if self.config.schedule == "plateau":
            self.plateau.update(value)
        if self.config.early_stop is not None and self.progress.waited >= self.config.early_stop:
            self.request_stop("early_stop")
        self.tell("on_evaluate", record)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        loss, norm = self.sums.tolist()
        progress = {**asdict(self.progress), "window": {**self.window, "loss": loss, "norm": norm}}
        groups = {
            "model": flow_tensors(self.model), "optimizer": optimizer_tensors(self.optimizer, {"theta": self.theta}),
            "random": random_tensors(self.device),
        }  # fmt: skip
        if self.best_theta is not None:
            groups["best"] = {"theta": self.best_theta}
        state: dict[str, Any] = {"progress": progress, "plateau": self.plateau.state_dict(), "identity": self.identity}
        state["clusters"] = list(self.model.clusters)
        self.last_checkpoint = checkpoint.save(self.folder, self.step, groups, state, keep=self.config.keep_checkpoints)
        self.tell("on_checkpoint", self.last_checkpoint)

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        check_state(found)
        identity.check(found.state["identity"], self.identity, model=FlowConfig, train=FlowTrainConfig)
        if "vae_settings" in found.state["identity"]:
            check_settings(found.state["identity"]["vae_settings"], self.model.vae)
        else:
            warn_of_unknown_settings(found.path)
        load_flow_tensors(self.model, found.tensors["model"])
        self.model.clusters = tuple(found.state["clusters"])
        restore_optimizer(self.optimizer, {"theta": self.theta}, found.tensors["optimizer"])
        self._progress = Progress(**found.state["progress"])
        self._reset_window(self.progress.window)
        self.plateau.load_state_dict(found.state["plateau"])
        if "best" in found.tensors:
            self.best_theta = found.tensors["best"]["theta"].to(self.device, self.dtype).clone()
        self.last_checkpoint = found.path
        checkpoint.set_aside(self.folder, after=found.path)
        restore_random(found.tensors["random"], self.device)

    def _result(self) -> FlowResult:
        return FlowResult(
            self.stop_reason or "completed", self.log.history, self.progress.best, self.last_checkpoint, self.step,
            self.step / self.steps_per_epoch, self.progress.seconds, self.progress.sentences,
        )  # fmt: skip
