"""LangVAE's encoder and decoder, `SentenceEncoder` and `SentenceDecoder`, on ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from lmvae_fast.config import DTYPES
from lmvae_fast.errors import ConfigError, LatentError
from lmvae_fast.integrations.langvae.containers import ModelOutput
from lmvae_fast.integrations.langvae.files import ENCODER_CLASSES, POOLINGS
from lmvae_fast.integrations.langvae.tokenization import token_ids
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.free_running import greedy_ids
from lmvae_fast.models.injection import Injection
from lmvae_fast.models.projectors import LinearProjector
from lmvae_fast.models.systems.presets import ENCODER_POOLING
from lmvae_fast.pretrained import load_pretrained

VISIBILITY = "rolling"
DROPOUT = 0.1
# LangVAE knows the pooling of these alone; of all other encoders it takes the plain mean.
LANGVAE_PRESETS = (
    "Salesforce/SFR-Embedding-2_R",
    "intfloat/multilingual-e5-large-instruct",
    "Alibaba-NLP/gte-Qwen2-1.5B-instruct",
    "NovaSearch/stella_en_1.5B_v5",
)
_PRESET = {"cls": ENCODER_CLASSES, "pooling_method": POOLINGS, "normalize": (False, True)}


class SentenceEncoder(nn.Module):
    """A frozen text encoder and the linear map to mu and logvar.

    Args:
        model_path: Hugging Face name or folder.
        latent_size: nz.
        decoder_tokenizer: of the decoder it will be used with (``decoder.tokenizer``): its tokens are what comes in.
        caching: keep the pooled vector of every sentence seen.
        automodel_preset: ``cls``, ``pooling_method`` ("mean", "cls" or "last") and ``normalize``; default: mean pooling, or
            what the encoder was trained for.
        device: of the model. args: must stay None.
        part: of this package: the encoder, where it is in memory already.

    Attributes:
        linear: ``[2 nz, features + labels]`` without bias; its width is known once a batch has been seen.

    Raises:
        ConfigError: an argument that cannot be honoured. CheckpointError: the encoder cannot be loaded.
    """

    def __init__(
        self,
        model_path: str,
        latent_size: int,
        decoder_tokenizer: Any,
        caching: bool = False,
        automodel_preset: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        args: Any = None,
        *,
        part: Encoder | None = None,
    ):
        super().__init__()
        _unused("SentenceEncoder", args=args)
        self.model_path, self.latent_size, self.caching = model_path, _positive("latent_size", latent_size), caching
        self.automodel_preset = _preset(model_path, automodel_preset)
        self.device = torch.device(device)
        # In a list, so that it is no child: a checkpoint holds what trains.
        if part is None:
            pooling, normalize = self.automodel_preset["pooling_method"], self.automodel_preset["normalize"]
            part = Encoder.load(model_path, dtype=torch.float32, pooling=pooling, normalize=normalize)
        self._part, self._decoder_tokenizer = [part.to(self.device)], [decoder_tokenizer]
        self.linear: nn.Linear = nn.LazyLinear(2 * latent_size, bias=False, device=self.device)
        self.cache: dict[tuple[int, ...], Tensor] = {}

    @property
    def part(self) -> Encoder:
        """The encoder of ours that it runs on."""
        return self._part[0]

    @property
    def encoder(self) -> nn.Module:
        """The Hugging Face model."""
        return self.part.model

    @property
    def tokenizer(self) -> Any:
        """The encoder's tokenizer."""
        return self.part.tokenizer

    @property
    def decoder_tokenizer(self) -> Any:
        """The tokenizer whose ids come in."""
        return self._decoder_tokenizer[0]

    @property
    def started(self) -> bool:
        """Whether the width of ``linear`` is known."""
        return not isinstance(self.linear.weight, nn.parameter.UninitializedParameter)

    @property
    def annotated(self) -> bool:
        """Whether it reads labels besides the sentence; False while that is not known."""
        return self.started and self.linear.weight.shape[1] != self.part.width

    def start(self, labels: int) -> None:
        """Settle the width of ``linear`` for so many labels. Raises ConfigError where it is settled otherwise."""
        width = self.part.width + labels
        if not self.started:
            self.linear(torch.zeros(1, width, device=self.device))
        elif self.linear.weight.shape[1] != width:
            raise ConfigError(
                "the encoder was made for another number of labels",
                value=f"{labels} labels in the batch",
                limit=f"{self.linear.weight.shape[1] - self.part.width}",
                remedy="give every batch the annotations that the model was trained with",
            )

    def to(self, device: Any, include_pretrained: bool = True) -> SentenceEncoder:  # type: ignore[override]
        """Move it; ``include_pretrained=False`` leaves the pretrained model where it is."""
        super().to(device)
        self.device = torch.device(device)
        if include_pretrained:
            self.part.to(device)
        self.cache = {key: value.to(device) for key, value in self.cache.items()}
        return self

    def recode(self, tok_ids: Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Pooled features ``[B, width]`` of the texts that the decoder's ids spell, without a graph."""
        rows = [tuple(row.tolist() if isinstance(row, Tensor) else row) for row in tok_ids]
        missing = list(dict.fromkeys(row for row in rows if row not in self.cache)) if self.caching else rows
        if missing:
            texts = self.decoder_tokenizer.batch_decode(
                [list(row) for row in missing], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            ids, mask = self.part.tokenize(texts)
            with torch.no_grad():
                pooled = self.part(ids.to(self.device), mask.to(self.device))
            if not self.caching:
                return pooled
            self.cache.update(zip(missing, pooled, strict=True))
        return torch.stack([self.cache[row] for row in rows])

    def forward(self, x: Any, c: Mapping[str, Tensor] | None = None) -> ModelOutput:
        """``embedding`` (mu) and ``log_covariance``, ``[B, nz]``, and ``cvars_embedding``, a pooled vector per kind of label.

        x: one-hot ``[B, S, V]`` (sparse or dense) or ids ``[B, S]`` of the decoder's tokenizer. c: kind of annotation ->
        one-hot labels ``[B, S, A]``.
        """
        rows, places = token_ids(x, self.decoder_tokenizer.pad_token_id)
        labels = pooled_labels(c, places, self.device)
        features = torch.cat([self.recode(rows), *labels], dim=-1)
        self.start(features.shape[1] - self.part.width)
        mu, logvar = self.linear(features).chunk(2, -1)
        return ModelOutput(embedding=mu, cvars_embedding=labels, log_covariance=logvar)


class SentenceDecoder(nn.Module):
    """A frozen causal language model and the projection of a latent to its keys and values.

    Args:
        model_path: Hugging Face name or folder.
        latent_size: nz. max_len: tokens that are generated; there are ``max_len + 1`` slots of memory.
        conditional: pooled labels come beside the latent.
        device: of the model. device_map: as in LangVAE of no effect on fewer than two GPUs; refused on more.
        args: must stay None.
        part: of this package: the decoder, where it is in memory already.

    ``state_dict`` has LangVAE's names: ``context_hidden.<layer>.weight`` and ``.bias``.

    Raises:
        ConfigError: an argument that cannot be honoured. CheckpointError, UnsupportedDecoderError, TokenizerError: the decoder
        cannot be loaded or used.
    """

    def __init__(
        self,
        model_path: str,
        latent_size: int,
        max_len: int,
        conditional: bool = False,
        device: torch.device | str = "cpu",
        device_map: str | None = None,
        args: Any = None,
        *,
        part: Decoder | None = None,
    ):
        super().__init__()
        _unused("SentenceDecoder", args=args)
        if device_map is not None and torch.device(device).type == "cuda" and torch.cuda.device_count() > 1:
            raise ConfigError(
                "SentenceDecoder cannot lay a decoder over several GPUs", value=f"device_map={device_map!r}",
                limit="None", remedy="train with lf.TrainConfig(shard=True) under torchrun",
            )  # fmt: skip
        self.model_path, self.latent_size = model_path, _positive("latent_size", latent_size)
        self.max_len, self.conditional, self.device_map = _positive("max_len", max_len), conditional, None
        if part is None:
            saved = str(load_pretrained(AutoConfig, model_path, "decoder").dtype).removeprefix("torch.")
            dtype = getattr(torch, saved if saved in DTYPES else "float32")
            part = Decoder.load(model_path, dtype=dtype, add_prefix_space=True)
        part.check_positions(self.max_len + 1, self.max_len, VISIBILITY)
        self._part = [part.to(torch.device(device))]
        tokenizer = part.tokenizer.tokenizer
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(part.tokenizer.eos_token_id)
        self.pkv_dims = (part.kv_heads, 1, part.head_dim)
        self.projector: LinearProjector | None = None
        self.register_state_dict_post_hook(_layers_apart)
        self.register_load_state_dict_pre_hook(_layers_together)
        if not conditional:
            self.start(0)

    @property
    def part(self) -> Decoder:
        """The decoder of ours that it runs on."""
        return self._part[0]

    @property
    def decoder(self) -> nn.Module:
        """The Hugging Face model."""
        return self.part.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer; the padding token is the end token."""
        return self.part.tokenizer.tokenizer

    @property
    def device(self) -> torch.device:
        """Of the language model."""
        return self.part.device

    @property
    def dtype_name(self) -> str:
        """Dtype that the language model is held in."""
        return str(self.part.dtype).removeprefix("torch.")

    def start(self, labels: int) -> LinearProjector:
        """The projector, made for so many labels if there is none yet. Raises ConfigError where it is made for others."""
        width = self.latent_size + labels
        if self.projector is None:
            part = self.part
            self.projector = LinearProjector(
                width, layers=part.num_layers, kv_heads=part.kv_heads, slots=self.max_len + 1, head_dim=part.head_dim,
                dropout=DROPOUT,
            ).to(part.device)  # fmt: skip
            self.projector.train(self.training)
        elif self.projector.weight.shape[-1] != width:
            raise ConfigError(
                "the decoder was made for latents of another width", value=width, limit=self.projector.weight.shape[-1],
                remedy="give every batch the annotations that the model was trained with",
            )  # fmt: skip
        return self.projector

    def to(self, device: Any, include_pretrained: bool = True) -> SentenceDecoder:  # type: ignore[override]
        """Move it; ``include_pretrained=False`` leaves the pretrained model where it is."""
        super().to(device)
        if include_pretrained:
            self.part.to(device)
        return self

    def inject(self, z: Tensor, steps: int, seed: int | None = None) -> Injection:
        """The memory of ``z`` ``[B, nz (+ labels)]`` for so many tokens. Raises LatentError for another shape."""
        if z.dim() != 2 or z.shape[1] < self.latent_size or (z.shape[1] > self.latent_size and not self.conditional):
            more = " and the labels" if self.conditional else ""
            raise LatentError("z has the wrong shape", value=tuple(z.shape), limit=f"[batch, {self.latent_size}{more}]")
        if not 0 < steps <= self.max_len:
            raise ConfigError("more tokens than the memory has slots for", value=steps, limit=f"1 to {self.max_len}")
        projector = self.start(z.shape[1] - self.latent_size)
        memory = projector(z.to(self.device), dtype=self.part.dtype, seed=seed, slots=steps)
        return Injection(VISIBILITY, memory, None, None)

    def greedy(self, z: Tensor) -> Tensor:
        """The ``max_len`` most probable tokens in turn, int64 ``[B, max_len]``; what follows an end token is kept."""
        with torch.no_grad():
            chunks = [greedy_ids(self.part, self.inject(rows, self.max_len), self.max_len) for rows in z.split(256)]
        return torch.cat(chunks)

    def forward(self, z: Tensor, max_len: int = 0) -> ModelOutput:
        """``reconstruction``: probabilities of the next token ``[B, max_len, V]`` as the decoder reads its own greedy output;
        differentiable in z and in the projection. max_len: 0 for all that the decoder was made for."""
        steps = max_len or self.max_len
        return ModelOutput(reconstruction=self.probabilities(self.inject(z, steps), z.shape[0], steps))

    def probabilities(self, injection: Injection, batch: int, steps: int) -> Tensor:
        """Probabilities ``[B, steps, V]`` over the decoder's own greedy output, in one parallel pass over it."""
        part, device = self.part, self.device
        ids = greedy_ids(part, injection.detach(), steps)
        start = ids.new_full((batch, 1), part.tokenizer.bos_token_id)
        hidden = part.hidden(
            torch.cat([start, ids[:, :-1]], 1).flatten(), injection,
            cu_seqlens=torch.arange(0, (batch + 1) * steps, steps, dtype=torch.int32, device=device),
            max_seqlen=steps,
            rows=torch.arange(batch, device=device).repeat_interleave(steps),
            token_index=torch.arange(steps, device=device).repeat(batch),
        )  # fmt: skip
        return part.logits(hidden).softmax(-1).view(batch, steps, -1)


def pooled_labels(labels: Mapping[str, Tensor] | None, places: int, device: torch.device) -> list[Tensor]:
    """For each kind of annotation ``[B, S, A]``, one-hot, the vector ``[B, A]`` that stands for a sentence: the mean over a
    row's places of its labels, weighted by linspace(0.1, 1), so that later words weigh more."""
    weights = torch.linspace(0.1, 1.0, places, device=device) / max(places, 1)
    out = []
    for kind, value in (labels or {}).items():
        dense = (value.to_dense() if value.is_sparse else value).to(device=device, dtype=torch.float32)
        if dense.dim() != 3 or dense.shape[1] != places:
            raise ConfigError(
                f"annotation {kind!r} must be one-hot over the sentences' places", value=tuple(dense.shape),
                limit=f"[batch, {places}, labels]", remedy="use TokenizedAnnotatedDataSet and collate_sparse_fn",
            )  # fmt: skip
        out.append(torch.einsum("s,bsa->ba", weights, dense))
    return out


def _layers_apart(module: SentenceDecoder, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A state dict of ours under LangVAE's names."""
    for name in ("weight", "bias"):
        whole = state.pop(f"{prefix}projector.{name}", None)
        if whole is not None:
            # Cloned: a view would carry the storage of all layers into a file.
            state.update({f"{prefix}context_hidden.{i}.{name}": layer.clone() for i, layer in enumerate(whole)})


def _layers_together(module: SentenceDecoder, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """LangVAE's names as ours, before a state dict is loaded."""
    for name in ("weight", "bias"):
        key = f"{prefix}context_hidden.{{}}.{name}"
        layers = [state.pop(key.format(i)) for i in range(module.part.num_layers) if key.format(i) in state]
        if layers:
            state[f"{prefix}projector.{name}"] = torch.stack(layers)
    weight = state.get(f"{prefix}projector.weight")
    if weight is not None:
        module.start(weight.shape[-1] - module.latent_size)


def _preset(model_path: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The complete preset: given, or what the encoder was trained for. Raises ConfigError for what it cannot hold."""
    preset = {"cls": ENCODER_CLASSES[0], "pooling_method": POOLINGS[0], "normalize": False}
    if given:
        preset |= given
    elif model_path in LANGVAE_PRESETS:
        own = ENCODER_POOLING[model_path]
        preset = {"cls": "AutoModel", "pooling_method": own["pooling"], "normalize": own["normalize"]}
    for name, value in preset.items():
        if name not in _PRESET or value not in _PRESET[name]:
            raise ConfigError(
                f"automodel_preset[{name!r}] cannot be honoured", value=repr(value),
                limit=", ".join(map(repr, _PRESET.get(name, _PRESET))),
            )  # fmt: skip
    return {**preset, "pooling_method": str(preset["pooling_method"])}


def _unused(what: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ConfigError(f"{what} has no use for {name}", value=repr(value)[:80], limit="None")


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1", value=repr(value))
    return value
