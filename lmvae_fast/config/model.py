"""What a model is made of."""

from __future__ import annotations

from dataclasses import dataclass

from lmvae_fast.config.base import ConfigBase
from lmvae_fast.errors import ConfigError

SYSTEMS = ("langvae", "optimus")
VISIBILITIES = ("prefix", "rolling", "interleaved")
POOLINGS = ("mean", "cls", "last", "pooler")
PROJECTORS = ("linear", "shared", "mlp", "none")
KL_MODES = ("sum", "dim_threshold", "free_bits", "sample_threshold")
DECODER_PARTS = ("all", "embeddings", "lora")
OBJECTIVES = ("elbo", "langvae-0.6")
DTYPES = ("float32", "float64", "float16", "bfloat16")


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
            "normalize",
            "embedding_shift",
            "length_normalize",
            "free_running",
            "train_encoder",
            "train_decoder",
            "conditional_decoder",
            "add_prefix_space",
        )
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
                "objective='langvae-0.6' has a length weighting of its own",
                value="length_normalize=True",
                remedy="use objective='elbo' or length_normalize=False",
            )
        if self.projector_hidden is not None and self.projector not in (None, "mlp"):
            raise ConfigError(
                "projector_hidden belongs to projector='mlp'",
                value=f"projector={self.projector!r}",
                remedy="set projector='mlp' or drop projector_hidden",
            )
        if self.decoder_part != "all" and self.train_decoder is False:
            raise ConfigError(
                "decoder_part says what of a decoder trains, and train_decoder=False freezes it",
                value=f"decoder_part={self.decoder_part!r}",
                remedy="set train_decoder=True, or drop decoder_part",
            )
        if self.conditional_decoder and not self.annotations:
            raise ConfigError(
                "conditional_decoder needs annotations", value="annotations=()", remedy="name the labels of the data"
            )
        if len(set(self.annotations)) != len(self.annotations):
            raise ConfigError("annotations repeat a label", value=self.annotations)
