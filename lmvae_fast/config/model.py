"""What a model is made of."""

from __future__ import annotations

from dataclasses import dataclass

from lmvae_fast.config.base import ConfigBase
from lmvae_fast.errors import ConfigError

SYSTEMS = ("langvae", "optimus", "llamavae", "cvae", "lmvae")
VISIBILITIES = ("prefix", "rolling", "interleaved")
POOLINGS = ("mean", "cls", "last", "pooler", "segments")
PROJECTORS = ("linear", "shared", "mlp", "adapter", "none")
KL_MODES = ("sum", "dim_threshold", "free_bits", "sample_threshold", "density_gap")
ENCODERS = ("text", "decoder_layers")
ENCODER_PADDINGS = ("masked", "released")
SHIFTS = ("linear", "mlp")
RESIDUALS = ("none", "skip", "gskip", "skip-linear", "gskip-linear")
STAGES = (0, 1, 2)
DECODER_PARTS = ("all", "embeddings", "lora")
OBJECTIVES = ("elbo", "langvae-0.6")
LATENT_INITS = ("uniform", "normal")
MEMORY_INITS = ("random", "sink", "mean")
POSTERIOR_INITS = ("random", "whitened")
MOST_SAMPLES = 65536  # a posterior, where 16 and 32 are published: every one is computed in every step
DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class LMVAEConfig(ConfigBase):
    """What a model is. Fields left at ``None`` take the value of the system's preset (``models/systems/``).

    Attributes:
        system: preset that fills the open fields: ``langvae`` (arXiv 2505.00004), ``optimus`` (arXiv 2004.04092),
            ``llamavae`` (arXiv 2312.13208), ``cvae`` (CVAE with G-Skip, IEEE TAI 7(2), 2026), which is trained on prompts
            with responses, or ``lmvae``, our own.
        encoder: Hugging Face name or folder of the text encoder; in a folder of sentence-transformers its own pooling, dense
            layers and norm are honoured.
        decoder: Hugging Face name or folder of the causal language model.
        latent_dim: width nz of the latent z.
        max_len: the most tokens predicted for a sentence, its end-of-sentence token included.
        visibility: what a token sees of the memory: ``prefix``, ``rolling`` or ``interleaved`` (docs/architecture.md).
        slots: memory slots per layer. Rolling and interleaved need ``max_len`` or more and take ``max_len + 1`` by
            default, as LangVAE does; prefix takes 1.
        pooling: ``mean``, ``cls``, ``last`` or ``pooler`` (BERT's tanh pooler) over the encoder's last hidden states, or
            ``segments``: the means over ``pooling_segments`` equal parts of the sentence, side by side, which keep its order.
        encoder_layer: whose states are pooled: 1 for those of the encoder's first layer, 0 for what goes into it, None for the
            last. The lower ones say more of a sentence's words, the last ones of what it means.
        normalize: L2-normalise the pooled vector.
        projector: ``linear`` (own K and V per slot), ``shared`` (one vector as key and as value), ``mlp`` (linear after a
            hidden GELU layer), ``adapter`` (a small network, then the layer's own key and value projections) or ``none``
            (no memory).
        projector_hidden: hidden width of the ``mlp`` and ``adapter`` projectors.
        projector_dropout: dropout on the projected memory, in training.
        embedding_shift: add a projection of z to every token embedding (Optimus).
        kl_mode: ``sum``, ``dim_threshold`` (a dimension counts when its KL exceeds kl_target), ``free_bits`` (a dimension
            counts kl_target at least), ``sample_threshold`` (a sentence counts when its KL exceeds kl_target) or
            ``density_gap`` (DG-KL: the KL of each dimension's aggregate over the responses of a prompt).
        kl_target: the threshold in nats.
        objective: ``elbo``, or ``langvae-0.6`` for the loss LangVAE 0.6.13 computes (its order of reduction).
        length_normalize: divide a sentence's reconstruction by its number of predicted tokens.
        free_running: train on the decoder's own greedy output (LangVAE) instead of teacher forcing.
        token_dropout: share of the tokens that a decoder reads in training which are replaced by the unknown token (Bowman et
            al. 2016), so that it has to ask its latent for them; never a sentence's first.
        count_start_token: count the start token where a sentence is divided by its length, in the loss (length_normalize) and
            in perplexity, as Optimus does: its published figures are of that kind.
        latent_init: how the maps from and to the latent start: ``uniform`` (as nn.Linear does, +-1/sqrt(inputs)) or
            ``normal`` (N(0, 0.02^2), as Optimus does).
        memory_init: what every memory slot starts as, whatever z: ``random``; ``sink``, the keys and values of the decoder's
            start token, which change next to nothing of what a decoder says; or ``mean``, those of its tokens on average. With
            the last two, what depends on z starts small.
        posterior_init: what the posterior starts as: ``random``, maps drawn by ``latent_init``; or ``whitened``: once data are
            there, means with unit variance along the principal directions of the encoder's features, and a standard deviation
            of .3, so that a latent tells sentences apart before anything is learnt.
        start_token: the token that a sentence begins with, spelled as in the decoder's vocabulary (``<|endoftext|>``); by
            default its tokenizer's begin-of-text, or the end token of one that has none.
        train_encoder, train_decoder: fine-tune the encoder or decoder instead of freezing it.
        decoder_part: what of a decoder that trains does: ``all``, ``embeddings`` (token embedding and head, LlaMaVAE) or
            ``lora`` (low-rank adapters; needs the ``lora`` extra).
        lora_rank, lora_alpha: of the adapters.
        annotations: names of the per-token labels that condition the encoder; empty for none.
        conditional_decoder: concatenate the pooled labels to z before the projector.
        add_prefix_space: tokenise the first word like any other.
        encoder_kind: ``text``, the pretrained encoder that ``encoder`` names, or ``decoder_layers``, trained copies of the
            decoder's first ``encoder_layers`` layers with ``queries`` learned queries, which read prompt and response.
        encoder_padding: ``masked``, or ``released`` for the public code's padding, which its Llama encoder attends to.
        max_prompt_len: the most tokens of a prompt; longer ones lose their left end. None for all.
        stage: what of a ``decoder_layers`` encoder and an ``adapter`` trains: 0 and 1 everything (0: the decoder, too), 2 all
            but the encoder's embedding and the adapter's projections, which are then the decoder's own.
        shift_kind: ``linear``, of z, or ``mlp``: a small network of a second draw from the posterior.
        output_residual: what is added to the final hidden state: ``none``, ``skip``, or ``gskip``, its gradient alone, both
            the mean over ``residual_samples`` draws of a small network; ``-linear`` behind either: of one linear map.
        bag_of_words: latents must also predict the response's words by themselves.
        contrast: responses must also be told apart by their latents: one more decoder pass for each response of a prompt.
        group_size: the most responses of a prompt that share an aggregate.
        kl_samples: draws from each posterior for a density gap. density_floor: added to twice the variance in its densities.
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
    pooling_segments: int = 8
    encoder_layer: int | None = None
    normalize: bool | None = None
    projector: str | None = None
    projector_hidden: int | None = None
    projector_dropout: float | None = None
    embedding_shift: bool | None = None
    kl_mode: str | None = None
    kl_target: float | None = None
    objective: str | None = None
    length_normalize: bool | None = None
    count_start_token: bool = False
    latent_init: str = "uniform"
    memory_init: str | None = None
    posterior_init: str | None = None
    start_token: str | None = None
    free_running: bool | None = None
    token_dropout: float = 0.0
    train_encoder: bool | None = None
    train_decoder: bool | None = None
    decoder_part: str | None = None
    lora_rank: int = 8
    lora_alpha: float = 16.0
    annotations: tuple[str, ...] = ()
    conditional_decoder: bool = False
    add_prefix_space: bool | None = None
    encoder_kind: str | None = None
    encoder_padding: str = "masked"
    encoder_layers: int = 2
    queries: int = 4
    max_prompt_len: int | None = None
    stage: int | None = None
    shift_kind: str | None = None
    output_residual: str | None = None
    residual_samples: int = 32
    bag_of_words: bool = False
    contrast: bool = False
    group_size: int = 16
    kl_samples: int = 16
    density_floor: float = 1e-4
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self._choice("system", SYSTEMS)
        for name, allowed in (
            ("visibility", VISIBILITIES),
            ("pooling", POOLINGS),
            ("projector", PROJECTORS),
            ("kl_mode", KL_MODES),
            ("objective", OBJECTIVES),
            ("decoder_part", DECODER_PARTS),
            ("encoder_kind", ENCODERS),
            ("shift_kind", SHIFTS),
            ("output_residual", RESIDUALS),
            ("memory_init", MEMORY_INITS),
            ("posterior_init", POSTERIOR_INITS),
        ):
            self._choice(name, allowed, optional=True)
        self._choice("encoder_padding", ENCODER_PADDINGS)
        self._choice("dtype", DTYPES)
        self._choice("latent_init", LATENT_INITS)
        self._number("lora_rank", 1, integer=True)
        self._number("lora_alpha", 0.0, open_low=True)
        self._number("latent_dim", 1, integer=True)
        self._number("max_len", 1, integer=True)
        for name in ("encoder_layers", "queries", "group_size", "pooling_segments"):
            self._number(name, 1, integer=True)
        for name in ("residual_samples", "kl_samples"):
            self._number(name, 1, MOST_SAMPLES, integer=True)
        self._number("max_prompt_len", 1, integer=True, optional=True)
        self._number("stage", 0, 2, integer=True, optional=True)
        self._number("density_floor", 0.0)
        self._number("slots", 1, integer=True, optional=True)
        self._number("encoder_layer", 0, integer=True, optional=True)
        self._number("projector_hidden", 1, integer=True, optional=True)
        self._number("projector_dropout", 0.0, 0.999, optional=True)
        self._number("token_dropout", 0.0, 0.999)
        self._number("kl_target", 0.0, optional=True)
        self._text("encoder")
        self._text("decoder")
        self._text("start_token", optional=True)
        self._flag(
            "normalize",
            "embedding_shift",
            "length_normalize",
            "count_start_token",
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

    @property
    def prompted(self) -> bool:
        """Whether the model is one of prompts with responses: ``max_len`` then counts a response's tokens alone."""
        return self.encoder_kind == "decoder_layers"

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
        if self.token_dropout and self.free_running:
            raise ConfigError(
                "token_dropout takes tokens away from what a decoder reads of the sentence, and free running reads none of it",
                value=f"token_dropout={self.token_dropout} with free_running=True", remedy="leave one of them out",
            )  # fmt: skip
        if self.projector_hidden is not None and self.projector not in (None, "mlp", "adapter"):
            raise ConfigError(
                "projector_hidden belongs to projector='mlp' and 'adapter'",
                value=f"projector={self.projector!r}",
                remedy="set projector to one of them or drop projector_hidden",
            )
        if self.memory_init in ("sink", "mean") and self.projector in ("shared", "none"):
            raise ConfigError(
                "the memory cannot start as a token's keys and values: "
                + ("a shared projector has one vector for both" if self.projector == "shared" else "there is none"),
                value=f"memory_init={self.memory_init!r} with projector={self.projector!r}",
                remedy="set memory_init='random', or projector='linear', 'mlp' or 'adapter'",
            )
        if self.latent_init == "normal" and (self.prompted or self.projector == "adapter"):
            raise ConfigError(
                "latent_init='normal' draws every map anew, and these hold copies of the decoder's projections and norms",
                value=f"projector={self.projector!r}, encoder_kind={self.encoder_kind!r}",
                limit="projector='linear', 'mlp' or 'shared' with encoder_kind='text'", remedy="set latent_init='uniform'",
            )  # fmt: skip
        if self.posterior_init == "whitened" and self.prompted:
            raise ConfigError(
                "a whitened posterior is one of a text encoder's features", value=f"encoder_kind={self.encoder_kind!r}",
                remedy="set posterior_init='random'; an encoder of the decoder's layers starts at the prior",
            )  # fmt: skip
        self._contradictions_of_prompts()
        if self.decoder_part not in (None, "all") and self.train_decoder is False:
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

    def _contradictions_of_prompts(self) -> None:
        if self.encoder_kind == "text" and self.kl_mode == "density_gap":
            raise ConfigError(
                "a density gap is one of the responses to a prompt, which a text encoder does not read",
                value="kl_mode='density_gap' with encoder_kind='text'", remedy="set encoder_kind='decoder_layers'",
            )  # fmt: skip
        refused = ("annotations", "free_running", "projector_dropout", "token_dropout")
        unfit = [name for name in refused if getattr(self, name)]
        unfit += ["objective"] if self.objective == "langvae-0.6" else []
        unfit += ["visibility"] if self.visibility not in (None, "prefix") else []
        if self.prompted and unfit:
            raise ConfigError(
                "prompts with responses have no such option", value=f"{unfit[0]}={getattr(self, unfit[0])!r}",
                remedy="leave it unset",
            )  # fmt: skip
        if self.encoder_kind == "text" and (self.bag_of_words or self.contrast):
            raise ConfigError(
                "bag_of_words and contrast are about the responses to a prompt", value="encoder_kind='text'",
                remedy="set encoder_kind='decoder_layers'",
            )  # fmt: skip
        if self.latent_dim % self.queries and self.encoder_kind == "decoder_layers":
            raise ConfigError(
                "every query gives an equal share of mu and logvar", value=f"latent_dim={self.latent_dim}",
                limit=f"a multiple of queries={self.queries}", remedy="change latent_dim or queries",
            )  # fmt: skip
        trains = {None: None, 0: True, 1: False, 2: False}[self.stage]
        if trains is not None and self.train_decoder not in (None, trains):
            raise ConfigError(
                "stage says whether the decoder trains, and train_decoder says otherwise",
                value=f"stage={self.stage}, train_decoder={self.train_decoder}", remedy="leave train_decoder unset",
            )  # fmt: skip
        if self.stage is not None and self.decoder_part not in (None, "all"):
            raise ConfigError(
                "stage says what trains, and decoder_part says otherwise", value=f"decoder_part={self.decoder_part!r}",
                limit="all", remedy="fine-tune the decoder by itself first",
            )  # fmt: skip
