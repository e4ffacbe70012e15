"""How a model is trained."""

from __future__ import annotations

from dataclasses import dataclass

from lmvae_fast.config.run import RunConfig
from lmvae_fast.errors import ConfigError

BETA_SCHEDULES = ("constant", "linear", "cyclical")
PRECISIONS = ("fp32", "bf16", "fp16")
MONITORS = ("elbo", "reconstruction", "loss")
FINAL_MODELS = ("last", "best")
ON_LONG = ("truncate", "drop", "error")


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """How a model is trained.

    Attributes:
        output_dir: folder for checkpoints, metrics and TensorBoard files.
        epochs: passes over the data; ignored when max_steps is set.
        max_steps: optimiser steps, or None.
        batch_size: sentences per micro-batch.
        accumulation: micro-batches per optimiser step.
        learning_rate, adam_betas, adam_eps, weight_decay: AdamW.
        schedule: learning rate over time: ``constant``, ``linear`` (to 0), ``cosine`` (to 0) or ``plateau``.
        warmup_steps: linear warm-up before the schedule.
        plateau_patience, plateau_factor: for ``plateau``: evaluations without progress, and the factor then applied.
        grad_clip: the most that the global gradient norm may be, or None.
        beta_schedule: weight of the KL over time: ``constant``, ``linear`` or ``cyclical``.
        beta: its value, or its maximum.
        beta_cycles, beta_zero, beta_increase: cycles; share of a cycle at 0; share spent rising (``linear`` rises over
            beta_increase of the run after beta_zero of it).
        precision: ``fp32``, or autocast in ``bf16`` / ``fp16`` (the latter with a gradient scaler).
        shard: hold the decoder's layers in pieces, one on each process (FSDP2); needs torchrun.
        fused_projector_update: update the projector's weight within the backward pass, so that its gradient, as large as
            the weight, is never made (not with fp16, whose scaler must see it). False: torch's AdamW for everything.
        embedding_rows_update: hold AdamW's moments, and do its work, only for those rows of a trained token embedding that have
            had a gradient: exact without weight decay, for an embedding that is not the head's weight too; refused otherwise.
        recompute_decoder: keep only what goes into the decoder's layers, and compute the rest anew in backward: less memory
            for long sentences or deep decoders, for one more forward pass.
        cuda_graphs: record whole steps as CUDA graphs, so that the host launches one graph a step: where it can be done (None,
            the default), always (True: refused where it cannot) or never. Batches are filled up to a few sizes for it.
        compile: run the decoder's layers through torch.compile; it compiles anew, for a while, at the first step and where
            sizes of batches begin to vary. Not with ``shard`` or ``recompute_decoder``.
        eval_every, save_every, log_every: in optimiser steps; None for once an epoch (log: 10).
        eval_batch_size: sentences per evaluation batch (default: batch_size).
        early_stop: evaluations without progress before stopping, or None.
        monitor: the evaluation figure that plateau, early_stop and the best checkpoint go by: ``elbo`` (at beta 1),
            ``reconstruction`` or ``loss`` (at the step's beta).
        keep_checkpoints: how many of the newest to keep.
        keep_best: also write and keep a checkpoint whenever an evaluation is the best so far.
        final_model: what the command line saves as the run's model: the ``last`` weights, or those of the ``best`` evaluation.
        on_long: what happens to sentences longer than the model's max_len: ``truncate``, ``drop`` or ``error``.
        cache_dir: where tokenised data and pooled encoder features are cached; None for ``output_dir/cache``.
        resume: continue from output_dir's newest complete checkpoint (True) or from the checkpoint folder named.
        seed: of the data order, the noise and dropout.
        tensorboard, progress: write TensorBoard files; draw a progress bar.
        bucket_batches: batches per length bucket window: sentences are sorted by length only within such a window.
    """

    output_dir: str = "runs/train"
    accumulation: int = 1
    beta_schedule: str = "cyclical"
    beta: float = 1.0
    beta_cycles: int = 16
    beta_zero: float = 0.25
    beta_increase: float = 0.25
    precision: str = "fp32"
    shard: bool = False
    fused_projector_update: bool = True
    embedding_rows_update: bool = False
    recompute_decoder: bool = False
    compile: bool = False
    cuda_graphs: bool | None = None
    eval_batch_size: int | None = None
    monitor: str = "elbo"
    final_model: str = "last"
    on_long: str = "truncate"
    bucket_batches: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice("beta_schedule", BETA_SCHEDULES)
        self._choice("precision", PRECISIONS)
        self._choice("on_long", ON_LONG)
        self._choice("monitor", MONITORS)
        self._choice("final_model", FINAL_MODELS)
        for name in ("accumulation", "beta_cycles", "bucket_batches"):
            self._number(name, 1, integer=True)
        self._number("eval_batch_size", 1, integer=True, optional=True)
        self._number("beta", 0.0)
        for name in ("beta_zero", "beta_increase"):
            self._number(name, 0.0, 1.0)
        self._flag("shard", "fused_projector_update", "embedding_rows_update", "recompute_decoder", "compile")
        if self.compile and (self.shard or self.recompute_decoder):
            raise ConfigError(
                "compile leaves a decoder's layers no hooks of their own, which shard and recompute_decoder put there",
                value=f"compile=True, shard={self.shard}, recompute_decoder={self.recompute_decoder}",
                remedy="set compile=False, or the others",
            )
        if self.beta_zero + self.beta_increase > 1.0:
            raise ConfigError(
                "beta_zero and beta_increase are shares of one cycle",
                value=f"{self.beta_zero} + {self.beta_increase}",
                limit="a sum <= 1",
                remedy="lower one of them",
            )
