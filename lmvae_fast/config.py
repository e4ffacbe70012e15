"""Configurations: frozen dataclasses with JSON and YAML in and out.

Unknown fields, values out of range and contradictions raise :class:`~lmvae_fast.errors.ConfigError` when the object is
made, so that a run never starts on a configuration it would not survive.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmvae_fast.config_base import ConfigBase
from lmvae_fast.errors import ConfigError

SYSTEMS = ("langvae", "optimus")
VISIBILITIES = ("prefix", "rolling", "interleaved")
POOLINGS = ("mean", "cls", "last", "pooler")
PROJECTORS = ("linear", "shared", "mlp", "none")
KL_MODES = ("sum", "dim_threshold", "free_bits", "sample_threshold")
DECODER_PARTS = ("all", "embeddings", "lora")
OBJECTIVES = ("elbo", "langvae-0.6")
DTYPES = ("float32", "float64", "float16", "bfloat16")
BETA_SCHEDULES = ("constant", "linear", "cyclical")
LEARNING_RATE_SCHEDULES = ("constant", "linear", "cosine", "plateau")
PRECISIONS = ("fp32", "bf16", "fp16")
MONITORS = ("elbo", "reconstruction", "loss")
ON_LONG = ("truncate", "drop", "error")


@dataclass(frozen=True)
class LMVAEConfig(ConfigBase):
    """What a model is. Fields left at ``None`` take the value of the system's preset (``models/systems.py``).

    Attributes:
        system: preset that fills the open fields: ``langvae`` (arXiv 2505.00004) or ``optimus`` (arXiv 2004.04092).
        encoder: Hugging Face name or folder of the text encoder.
        decoder: Hugging Face name or folder of the causal language model.
        latent_dim: width nz of the latent z.
        max_len: the most tokens predicted for a sentence, its end-of-sentence token included.
        visibility: what a token sees of the memory: ``prefix``, ``rolling`` or ``interleaved`` (docs/architecture.md).
        slots: memory slots per layer. Rolling and interleaved need ``max_len`` or more and take ``max_len + 1`` by
            default, as LangVAE does; prefix takes 1.
        pooling: ``mean``, ``cls``, ``last`` or ``pooler`` (BERT's tanh pooler) over the encoder's last hidden states.
        normalize: L2-normalise the pooled vector.
        projector: ``linear`` (own K and V per slot), ``shared`` (one vector as key and as value), ``mlp`` (linear after a
            hidden GELU layer) or ``none`` (no memory).
        projector_hidden: hidden width of the ``mlp`` projector.
        projector_dropout: dropout on the projected memory, in training.
        embedding_shift: add a projection of z to every token embedding (Optimus).
        kl_mode: ``sum``, ``dim_threshold`` (a dimension counts when its KL exceeds kl_target), ``free_bits`` (a dimension
            counts kl_target at least) or ``sample_threshold`` (a sentence counts when its KL exceeds kl_target).
        kl_target: the threshold in nats.
        objective: ``elbo``, or ``langvae-0.6`` for the loss LangVAE 0.6.13 computes (its order of reduction).
        length_normalize: divide a sentence's reconstruction by its number of predicted tokens.
        free_running: train on the decoder's own greedy output (LangVAE) instead of teacher forcing.
        train_encoder, train_decoder: fine-tune the encoder or decoder instead of freezing it.
        decoder_part: what of a decoder that trains does: ``all``, ``embeddings`` (token embedding and head, LlaMaVAE) or
            ``lora`` (low-rank adapters; needs the ``lora`` extra).
        lora_rank, lora_alpha: of the adapters.
        annotations: names of the per-token labels that condition the encoder; empty for none.
        conditional_decoder: concatenate the pooled labels to z before the projector.
        add_prefix_space: tokenise the first word like any other.
        dtype: dtype that a frozen encoder or decoder is held in, and of the memory. What trains, and an encoder or decoder
            of which a part trains, is float32 (float64 of a float64 model).
    """

    system: str = "langvae"
    encoder: str = "bert-base-cased"
    decoder: str = "gpt2"
    latent_dim: int = 128
    max_len: int = 32
    visibility: str | None = None
    slots: int | None = None
    pooling: str | None = None
    normalize: bool | None = None
    projector: str | None = None
    projector_hidden: int | None = None
    projector_dropout: float | None = None
    embedding_shift: bool | None = None
    kl_mode: str | None = None
    kl_target: float | None = None
    objective: str | None = None
    length_normalize: bool | None = None
    free_running: bool | None = None
    train_encoder: bool | None = None
    train_decoder: bool | None = None
    decoder_part: str = "all"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    annotations: tuple[str, ...] = ()
    conditional_decoder: bool = False
    add_prefix_space: bool | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self._choice("system", SYSTEMS)
        for name, allowed in (
            ("visibility", VISIBILITIES),
            ("pooling", POOLINGS),
            ("projector", PROJECTORS),
            ("kl_mode", KL_MODES),
            ("objective", OBJECTIVES),
        ):
            self._choice(name, allowed, optional=True)
        self._choice("dtype", DTYPES)
        self._choice("decoder_part", DECODER_PARTS)
        self._number("lora_rank", 1, integer=True)
        self._number("lora_alpha", 0.0, open_low=True)
        self._number("latent_dim", 1, integer=True)
        self._number("max_len", 1, integer=True)
        self._number("slots", 1, integer=True, optional=True)
        self._number("projector_hidden", 1, integer=True, optional=True)
        self._number("projector_dropout", 0.0, 0.999, optional=True)
        self._number("kl_target", 0.0, optional=True)
        self._text("encoder")
        self._text("decoder")
        self._flag(
            "normalize", "embedding_shift", "length_normalize", "free_running", "train_encoder", "train_decoder",
            "conditional_decoder", "add_prefix_space",
        )  # fmt: skip
        if not isinstance(self.annotations, tuple) or not all(isinstance(label, str) for label in self.annotations):
            raise ConfigError(
                "LMVAEConfig.annotations must be a tuple of label names", value=repr(self.annotations), limit="strings"
            )
        self._contradictions()

    def _contradictions(self) -> None:
        if self.visibility in ("rolling", "interleaved") and self.slots is not None and self.slots < self.max_len:
            raise ConfigError(
                f"{self.visibility} visibility gives every predicted token a slot of its own",
                value=f"slots={self.slots} with max_len={self.max_len}",
                limit=f"slots >= {self.max_len}",
                remedy="leave slots unset, or lower max_len",
            )
        if self.projector == "none" and self.embedding_shift is False:
            raise ConfigError(
                "projector='none' with embedding_shift=false leaves the latent no way into the decoder",
                remedy="enable one of them",
            )
        if self.objective == "langvae-0.6" and self.length_normalize:
            raise ConfigError(
                "objective='langvae-0.6' has a length weighting of its own", value="length_normalize=True",
                remedy="use objective='elbo' or length_normalize=False",
            )  # fmt: skip
        if self.projector_hidden is not None and self.projector not in (None, "mlp"):
            raise ConfigError(
                "projector_hidden belongs to projector='mlp'",
                value=f"projector={self.projector!r}",
                remedy="set projector='mlp' or drop projector_hidden",
            )
        if self.decoder_part != "all" and self.train_decoder is False:
            raise ConfigError(
                "decoder_part says what of a decoder trains, and train_decoder=False freezes it",
                value=f"decoder_part={self.decoder_part!r}", remedy="set train_decoder=True, or drop decoder_part",
            )  # fmt: skip
        if self.conditional_decoder and not self.annotations:
            raise ConfigError(
                "conditional_decoder needs annotations", value="annotations=()", remedy="name the labels of the data"
            )
        if len(set(self.annotations)) != len(self.annotations):
            raise ConfigError("annotations repeat a label", value=self.annotations)


@dataclass(frozen=True)
class TrainConfig(ConfigBase):
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
        recompute_decoder: keep only what goes into the decoder's layers, and compute the rest anew in backward: less memory
            for long sentences or deep decoders, for one more forward pass.
        compile: run the decoder's layers through torch.compile; it compiles anew, for a while, at the first step and where
            sizes of batches begin to vary. Not with ``shard`` or ``recompute_decoder``.
        eval_every, save_every, log_every: in optimiser steps; None for once an epoch (log: 10).
        eval_batch_size: sentences per evaluation batch (default: batch_size).
        early_stop: evaluations without progress before stopping, or None.
        monitor: the evaluation figure that plateau, early_stop and the best checkpoint go by: ``elbo`` (at beta 1),
            ``reconstruction`` or ``loss`` (at the step's beta).
        keep_checkpoints: how many of the newest to keep.
        on_long: what happens to sentences longer than the model's max_len: ``truncate``, ``drop`` or ``error``.
        cache_dir: where tokenised data and pooled encoder features are cached; None for ``output_dir/cache``.
        resume: continue from output_dir's newest complete checkpoint (True) or from the checkpoint folder named.
        seed: of the data order, the noise and dropout.
        tensorboard, progress: write TensorBoard files; draw a progress bar.
        bucket_batches: batches per length bucket window: sentences are sorted by length only within such a window.
    """

    output_dir: str = "runs/train"
    epochs: int = 20
    max_steps: int | None = None
    batch_size: int = 50
    accumulation: int = 1
    learning_rate: float = 1e-3
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    plateau_patience: int = 5
    plateau_factor: float = 0.5
    grad_clip: float | None = 1.0
    beta_schedule: str = "cyclical"
    beta: float = 1.0
    beta_cycles: int = 16
    beta_zero: float = 0.25
    beta_increase: float = 0.25
    precision: str = "fp32"
    shard: bool = False
    fused_projector_update: bool = True
    recompute_decoder: bool = False
    compile: bool = False
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int = 10
    eval_batch_size: int | None = None
    early_stop: int | None = None
    monitor: str = "elbo"
    keep_checkpoints: int = 2
    on_long: str = "truncate"
    cache_dir: str | None = None
    resume: bool | str = False
    seed: int = 0
    tensorboard: bool = True
    progress: bool = True
    bucket_batches: int = 16

    def __post_init__(self) -> None:
        self._choice("schedule", LEARNING_RATE_SCHEDULES)
        self._choice("beta_schedule", BETA_SCHEDULES)
        self._choice("precision", PRECISIONS)
        self._choice("on_long", ON_LONG)
        self._choice("monitor", MONITORS)
        for name in ("epochs", "batch_size", "accumulation", "beta_cycles", "log_every", "keep_checkpoints"):
            self._number(name, 1, integer=True)
        for name in ("max_steps", "eval_every", "save_every", "eval_batch_size", "early_stop"):
            self._number(name, 1, integer=True, optional=True)
        for name in ("warmup_steps", "plateau_patience", "seed"):
            self._number(name, 0, integer=True)
        self._number("bucket_batches", 1, integer=True)
        self._number("learning_rate", 0.0, open_low=True)
        self._number("adam_eps", 0.0, open_low=True)
        self._number("weight_decay", 0.0)
        self._number("plateau_factor", 0.0, 0.9999, open_low=True)
        self._number("grad_clip", 0.0, optional=True, open_low=True)
        self._number("beta", 0.0)
        for name in ("beta_zero", "beta_increase"):
            self._number(name, 0.0, 1.0)
        betas = self.adam_betas
        good = isinstance(betas, tuple) and len(betas) == 2
        if not good or not all(isinstance(beta, (int, float)) and 0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError("TrainConfig.adam_betas is out of range", value=betas, limit="two numbers in [0, 1)")
        self._text("output_dir")
        self._text("cache_dir", optional=True)
        self._flag("tensorboard", "progress", "shard", "fused_projector_update", "recompute_decoder", "compile")
        if self.compile and (self.shard or self.recompute_decoder):
            raise ConfigError(
                "compile leaves a decoder's layers no hooks of their own, which shard and recompute_decoder put there",
                value=f"compile=True, shard={self.shard}, recompute_decoder={self.recompute_decoder}",
                remedy="set compile=False, or the others",
            )  # fmt: skip
        if not isinstance(self.resume, bool):
            self._text("resume")
        if self.beta_zero + self.beta_increase > 1.0:
            raise ConfigError(
                "beta_zero and beta_increase are shares of one cycle",
                value=f"{self.beta_zero} + {self.beta_increase}",
                limit="a sum <= 1",
                remedy="lower one of them",
            )


@dataclass(frozen=True)
class GenerationConfig(ConfigBase):
    """How latents become text.

    Attributes:
        max_new_tokens: the most tokens per sentence, a prompt not counted; None for what the model's max_len leaves.
        do_sample: draw tokens; otherwise greedy.
        temperature, top_k, top_p, min_p: of the draw, in this order (``kernels/sample_token``). ``top_k`` 0, ``top_p`` 1.0
            and ``min_p`` 0.0 switch a filter off.
        repetition_penalty: above 1 makes tokens of the prompt and of the sentence so far less probable; also for greedy.
        seed: of the draw; None takes it from torch's generator. A sentence's draw depends on its row, not on its batch.
        num_samples: sentences drawn per latent; they share its projection.
        num_beams: above 1, beam search of that width instead of the greedy sentence.
        length_penalty: of beam search: a sentence's log-probability is divided by its length, end token included, to this
            power; 0 compares whole sentences, 1 tokens' averages.
        stop_tokens: ids that end a sentence, beside the tokenizer's end token; the token itself is not kept.
        logprobs: also return the log-probability of every token under the model's own distribution.
        batch_size: sentences decoded at a time.
        pack_weights: on a CPU, keep a second copy of a frozen decoder's weights in the layout its matrix units read fastest.
        cuda_graphs: on a CUDA device, record the decode step once per batch size and replay it; None does where it can.
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    num_samples: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    logprobs: bool = False
    batch_size: int = 64
    pack_weights: bool = True
    cuda_graphs: bool | None = None

    def __post_init__(self) -> None:
        self._number("max_new_tokens", 1, integer=True, optional=True)
        self._number("temperature", 0.0, open_low=True)
        self._number("top_k", 0, integer=True)
        self._number("top_p", 0.0, 1.0, open_low=True)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.0, open_low=True)
        self._number("seed", 0, integer=True, optional=True)
        self._number("num_samples", 1, integer=True)
        self._number("num_beams", 1, integer=True)
        self._number("length_penalty", 0.0)
        self._number("batch_size", 1, integer=True)
        self._flag("do_sample", "logprobs", "pack_weights", "cuda_graphs")
        stops = self.stop_tokens
        if not isinstance(stops, tuple) or not all(type(token) is int and token >= 0 for token in stops):
            raise ConfigError("GenerationConfig.stop_tokens is out of range", value=repr(stops), limit="a tuple of token ids")
        filtered = (self.temperature, self.top_k, self.top_p, self.min_p) != (1.0, 0, 1.0, 0.0)
        if not self.do_sample and (filtered or self.num_samples != 1):
            raise ConfigError(
                "temperature, top_k, top_p, min_p and num_samples only act when tokens are drawn",
                value="do_sample=False",
                remedy="set do_sample=True",
            )
        if self.num_beams > 1 and (self.do_sample or self.logprobs or self.repetition_penalty != 1.0):
            raise ConfigError(
                "beam search takes the most probable sentences of the model's own distribution",
                value=f"num_beams={self.num_beams} with do_sample, logprobs or repetition_penalty", remedy="leave them out",
            )  # fmt: skip
