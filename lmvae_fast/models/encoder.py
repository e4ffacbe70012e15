"""Any Hugging Face text encoder, pooled."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from lmvae_fast.errors import ConfigError, DataError, TokenizerError
from lmvae_fast.files import tensor_bytes
from lmvae_fast.memory import check_memory
from lmvae_fast.models.encoder_attention import choose_attention
from lmvae_fast.models.sentence_modules import load_dense, read_modules, write_modules
from lmvae_fast.pretrained import load_pretrained
from lmvae_fast.text.batch import Batch
from lmvae_fast.text.checks import check_size
from lmvae_fast.text.special_tokens import SpecialTokens


class Encoder(nn.Module):
    """A text encoder with pooling.

    Args:
        model: encoder-only model (BERT, MiniLM, T5's encoder) or decoder-type embedding model (Qwen2).
        tokenizer: its tokenizer.
        pooling: ``mean`` over real tokens, ``cls`` (first), ``last`` (last real token), ``pooler`` (BERT's) or ``segments``
            (means over equal parts of the real tokens, side by side).
        segments: how many parts.
        layer: whose states are pooled, 0 for the embeddings; None for the last hidden states.
        normalize: L2-normalise the result.
        train: whether its parameters train; frozen and in evaluation mode otherwise.
        source: name or folder it came from, if any.
        dense: layers between pooling and norm (sentence-T5), or None.
        max_tokens: the most tokens read of a text, where that is less than the model takes. lower: lower texts first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        pooling: str = "mean",
        normalize: bool = False,
        train: bool = False,
        source: str | None = None,
        dense: nn.Sequential | None = None,
        max_tokens: int | None = None,
        lower: bool = False,
        segments: int = 8,
        layer: int | None = None,
    ):
        super().__init__()
        if not isinstance(model, PreTrainedModel):
            raise ConfigError(
                f"{type(model).__name__} has no configuration of its own, so that it could not be saved and loaded again",
                remedy="use another encoder",
            )
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise TokenizerError(
                    "the encoder's tokenizer has neither a padding nor an end token",
                    value=type(tokenizer).__name__,
                    remedy="set tokenizer.pad_token",
                )
            tokenizer.pad_token = tokenizer.eos_token
        if pooling == "pooler" and getattr(model, "pooler", None) is None:
            raise ConfigError(
                f"{type(model).__name__} has no pooler",
                value="pooling='pooler'",
                limit="mean, cls, last",
                remedy="choose another pooling",
            )
        if (pooling == "segments" or layer is not None) and dense is not None:
            raise ConfigError(
                "the encoder's dense layers take its own pooled vector", value=f"pooling={pooling!r}, layer={layer}",
                remedy="choose the encoder's own pooling, of its last layer",
            )  # fmt: skip
        layers = getattr(model.config, "num_hidden_layers", None)
        if layer is not None and (pooling == "pooler" or (layers is not None and not 0 <= layer <= layers)):
            raise ConfigError(
                "the encoder has no such states to pool", value=f"encoder_layer={layer} with pooling={pooling!r}",
                limit=f"layers 0 to {layers}, and no pooler, which reads the last", remedy="leave encoder_layer unset",
            )  # fmt: skip
        self.model, self.tokenizer, self.pooling, self.normalize = model, tokenizer, pooling, normalize
        self.segments, self.layer = segments, layer
        embedding: Any = model.get_input_embeddings()
        if not isinstance(getattr(embedding, "weight", None), Tensor):
            raise ConfigError(
                f"{type(model).__name__} has no table of token embeddings", value=type(embedding).__name__,
                remedy="use a text encoder that reads input_ids",
            )  # fmt: skip
        self._vocabulary: int = embedding.weight.shape[0]
        check_size(tokenizer, self._vocabulary, "encoder")
        self._texts = SpecialTokens(tokenizer)
        self.trains, self.source = train, source
        self.stated_tokens, self.lower = max_tokens, lower
        wide = next(model.parameters())
        self.dense = None
        if dense is not None:
            self.dense = dense.to(wide.device, torch.promote_types(wide.dtype, torch.float32)).requires_grad_(train)
        model.requires_grad_(train)
        if pooling != "pooler" and getattr(model, "pooler", None) is not None:
            model.pooler.requires_grad_(False)  # unused: an optimiser would only decay it
        self.train(False)
        limits = [limit for limit in (longest_input(model), max_tokens) if limit is not None]
        self.max_tokens = min(limits, default=None)
        self.width = self._examine()

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: torch.dtype,
        pooling: str = "mean",
        normalize: bool = False,
        train: bool = False,
        segments: int = 8,
        layer: int | None = None,
    ) -> Encoder:
        """Load from a Hugging Face name, a folder, or a packaged model; raises CheckpointError when it cannot be had.

        Dense layers and limits of a folder of sentence-transformers are honoured; pooling and norm are as given. An encoder
        that trains is held in float32 at least: half precision is then a matter of autocast.
        """
        dtype = torch.promote_types(dtype, torch.float32) if train else dtype
        source, modules = name, read_modules(name)
        extra: dict[str, Any] = {}
        if modules is not None:
            name = modules.transformer
            own = pooling != "segments" and layer is None  # the vector that its dense layers were made for
            dense = load_dense(modules) if own else None
            extra = {"dense": dense, "max_tokens": modules.max_tokens, "lower": modules.lower}
        config = load_pretrained(AutoConfig, name, "encoder")
        # Not by is_encoder_decoder: a saved T5 encoder has it cleared, and AutoModel would make it a whole T5 again.
        auto_class: Any = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        auto_class = _saved_encoder_half(config) or auto_class
        # Many checkpoints come without the pooler, which is not used unless it is asked for.
        may_lack = () if pooling == "pooler" else ("pooler.",)
        model = load_pretrained(auto_class, name, "encoder", may_lack=may_lack, dtype=dtype)
        if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
            # BART, mBART: the whole model's last hidden state is its decoder's.
            model = model.get_encoder()
        tokenizer = load_pretrained(AutoTokenizer, name, "encoder tokenizer")
        extra |= {"segments": segments, "layer": layer}
        return cls(model, tokenizer, pooling=pooling, normalize=normalize, train=train, source=source, **extra)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> Encoder:
        """A frozen encoder stays in evaluation mode."""
        super().train(mode and self.trains)
        return self

    @torch.no_grad()
    def _examine(self) -> int:
        """Width of the pooled vector; raises ConfigError where a sentence's vector depends on what it is padded with."""
        if self.device.type == "meta":
            widths = [module.out_features for module in self.dense or () if isinstance(module, nn.Linear)]
            width = widths[-1] if widths else self.model.config.hidden_size
            return width * self.segments if self.pooling == "segments" else width
        name = type(self.model).__name__
        texts = ["a cat is an animal", "a cat is a kind of animal that lives with people in their houses"]
        if self.pooling == "segments":
            width = getattr(self.model.config, "hidden_size", 1024)
            check_memory(f"means of {self.segments:,} parts", "lower pooling_segments", 16 * self.segments * width)
        try:
            alone = self(*(part.to(self.device) for part in self.tokenize(texts[:1])))
            padded = self(*(part.to(self.device) for part in self.tokenize(texts)))[:1]
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, OverflowError, KeyError) as error:
            others = inspect.signature(self.model.forward).parameters.keys() - {"input_ids", "attention_mask"}
            if wanted := sorted(other for other in others if re.search(rf"\b{other}\b", str(error))):
                raise ConfigError(
                    f"{name} does not read text alone", value=f"it asks for {' or '.join(wanted)}",
                    remedy="use a text encoder (BERT, MiniLM, T5, RoBERTa, Qwen ...)",
                ) from error  # fmt: skip
            raise ConfigError(
                f"{name} cannot be run as a text encoder: {str(error).strip().splitlines()[0][:200]}",
                remedy="use a text encoder that takes input_ids and attention_mask (BERT, MiniLM, T5, RoBERTa, Qwen ...)",
            ) from error
        difference = ((alone - padded).norm() / alone.norm().clamp_min(1e-9)).item()
        dtype = next(self.model.parameters()).dtype
        if not difference <= (0.05 if dtype in (torch.float16, torch.bfloat16) else 1e-3):
            raise ConfigError(
                f"{name} gives a sentence other features beside a longer one: it does not leave its padding out",
                value=f"off by {difference:.1e} of their norm",
                remedy="use another encoder" if self.pooling != "last" else "use pooling='mean', or another encoder",
            )
        return alone.shape[1]

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Padded ids and mask, both int64 ``[batch, tokens]``; longer texts are cut at the encoder's own limit.

        A special token that is spelled in a text ("[MASK]", "</s>") is text like any other.

        Raises DataError when the tokenizer makes ids that the encoder has no embedding for.
        """
        limit = min(self.tokenizer.model_max_length, self.max_tokens or 10**9)
        texts, longest = self._read(texts), limit if limit < 10**6 else None
        encoded: Any = {}
        if not any(map(self.spells_special, texts)):
            encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        else:
            own = self._texts.encode(texts, add_special_tokens=True, longest=longest)
            encoded["input_ids"] = _padded(own, self.tokenizer.pad_token_id, self.tokenizer.padding_side)
            encoded["attention_mask"] = _padded([[1] * len(ids) for ids in own], 0, self.tokenizer.padding_side)
        ids, rows = encoded["input_ids"], self._vocabulary
        if ids.numel() and int(ids.max()) >= rows:
            raise DataError(
                "the encoder's tokenizer made a token the encoder does not know",
                value=int(ids.max()),
                limit=f"< {rows}",
                remedy="use the encoder's own tokenizer",
            )
        return ids, encoded["attention_mask"]

    def _read(self, texts: Sequence[str]) -> list[str]:
        return [text.lower() for text in texts] if self.lower else list(texts)

    def spells_special(self, text: str) -> bool:
        """Whether a text spells a special token of the encoder's tokenizer."""
        return self._texts.spelled(text)

    def unknown_tokens(self, texts: Sequence[str]) -> tuple[int, int]:
        """How many tokens of these texts its tokenizer does not know, and how many there are; none where it knows all."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None or unknown == self.tokenizer.eos_token_id:
            return 0, 0
        rows = self._texts.encode(self._read(texts), add_special_tokens=False)
        return sum(ids.count(unknown) for ids in rows), sum(map(len, rows))

    def features(self, batch: Batch) -> Tensor:
        """Pooled features of a batch, ``[B, width]``."""
        if batch.encoder_ids is None or batch.encoder_mask is None or batch.encoder_cu_seqlens is not None:
            raise ConfigError(
                "a text encoder reads padded sentences", value="a batch of prompts with responses",
                remedy="use system='cvae' for prompts",
            )  # fmt: skip
        return self(batch.encoder_ids, batch.encoder_mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pooled features, float32 ``[batch, width]``; without a graph when the encoder is frozen."""
        choose_attention(self.model)
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            more = {} if self.layer is None else {"output_hidden_states": True}
            out = self.model(input_ids=input_ids, attention_mask=attention_mask, **more)
            states = out.last_hidden_state if self.layer is None else out.hidden_states[self.layer]
            pooled = (
                out.pooler_output
                if self.pooling == "pooler"
                else pool(states, attention_mask, self.pooling, self.segments)
            )
            pooled = pooled.float() if pooled.dtype in (torch.float16, torch.bfloat16) else pooled
            pooled = pooled if self.dense is None else self.dense(pooled)
            return nn.functional.normalize(pooled, dim=1) if self.normalize else pooled

    @torch.no_grad()
    def pool_texts(
        self,
        texts: Sequence[str],
        lengths: Sequence[int],
        *,
        batch_size: int = 64,
        dtype: torch.dtype = torch.float32,
        progress: Any = None,
    ) -> Tensor:
        """Pooled features of any number of texts, ``[N, width]`` in ``dtype`` on the CPU.

        lengths: of the texts, in any unit: the longest are read first, so that batches pad little. progress: called with the
        number of texts done after every batch, if given.
        """
        order = sorted(range(len(texts)), key=lambda row: -lengths[row])
        features = torch.empty(len(texts), self.width, dtype=dtype)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = self.tokenize([texts[row] for row in rows])
            features[rows] = self(ids.to(self.device), mask.to(self.device)).to(features)
            if progress is not None:
                progress(len(rows))
        return features

    def write_modules(self, folder: Path) -> None:
        """Write beside the saved transformer what it takes besides: dense layers and limits, as sentence-transformers does."""
        if self.dense is not None or self.stated_tokens is not None or self.lower:
            write_modules(
                folder, pooling=self.pooling, normalize=self.normalize, width=self.model.config.hidden_size,
                dense=self.dense, max_tokens=self.stated_tokens, lower=self.lower,
            )  # fmt: skip

    def fingerprint(self) -> str:
        """SHA-256 over the weights and the pooling: features cached under it are this encoder's, hexadecimal."""
        parts = f" {self.segments}" if self.pooling == "segments" else ""
        parts += "" if self.layer is None else f" layer {self.layer}"
        digest = hashlib.sha256(f"{self.pooling}{parts} {self.normalize} {type(self.model).__name__}".encode())
        state = self.model.state_dict()
        if self.dense is not None or self.stated_tokens is not None or self.lower:
            digest.update(f" {self.stated_tokens} {self.lower} {self.dense}".encode())
            state |= (
                {}
                if self.dense is None
                else {f"dense.{name}": value for name, value in self.dense.state_dict().items()}
            )
        for name, parameter in sorted(state.items()):
            digest.update(name.encode())
            digest.update(tensor_bytes(parameter))
        return digest.hexdigest()


def _padded(rows: Sequence[Sequence[int]], filler: int, side: str) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, filler, side)


def segment_means(hidden: Tensor, mask: Tensor, segments: int) -> Tensor:
    """Means over ``segments`` equal parts of each sentence's real tokens, side by side: ``[batch, segments * width]``.

    A token that lies across a border counts in both parts by its shares; where there are fewer tokens than parts, a token fills
    several. Every token counts the same in the mean of the parts, which is that of the sentence.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    place = mask.cumsum(1, dtype=dtype) - 1  # of real tokens, whichever side the padding is on
    share = mask.sum(1, dtype=dtype).clamp_min(1)[:, None] / segments  # tokens of a part
    start = torch.arange(segments, device=mask.device) * share
    first = torch.maximum(start[:, :, None], place[:, None])
    last = torch.minimum((start + share)[:, :, None], place[:, None] + 1)
    weight = (last - first).clamp_min(0) * mask[:, None] / share[:, :, None]
    return (weight.to(hidden.dtype) @ hidden).flatten(1)


def longest_input(model: nn.Module) -> int | None:
    """The most tokens that an encoder has positions for; None for any number (relative positions)."""
    config: Any = _of_text(model.config)
    names = ("max_encoder_position_embeddings", "max_position_embeddings")  # LED names its halves apart
    longest = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    if longest is None or longest < 1:  # XLNet says -1
        return None
    for name, module in model.named_modules():
        # RoBERTa's positions begin behind the padding token's; I-BERT's table is a module of its own.
        first, weight = getattr(module, "padding_idx", None), getattr(module, "weight", None)
        if name.endswith("position_embeddings") and first is not None and isinstance(weight, Tensor):
            return min(longest, weight.shape[0] - first - 1)
    return longest


def _of_text(config: Any) -> Any:
    """The part of a configuration that is about text, where it has parts (speech models with a language model inside)."""
    try:
        return config.get_text_config()
    except ValueError:  # two of them
        return config


def _saved_encoder_half(config: Any) -> type[PreTrainedModel] | None:
    """The class of the encoder half of an encoder-decoder (BART), where a folder holds nothing but that half."""
    names = getattr(config, "architectures", None) or [""]
    if not getattr(config, "is_encoder_decoder", False) or not names[0].endswith("Encoder"):
        return None
    module = sys.modules[AutoModel._model_mapping[type(config)].__module__]
    return getattr(module, names[0], None)


def pool(hidden: Tensor, mask: Tensor, pooling: str, segments: int = 1) -> Tensor:
    """Pool hidden states ``[batch, tokens, width]`` under a 0/1 mask ``[batch, tokens]`` (``mean``, ``cls``, ``last``,
    ``segments``); ``[batch, width]``, or ``[batch, segments * width]``."""
    if pooling == "segments":
        return segment_means(hidden, mask, segments)
    if pooling == "mean":
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1e-9)
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        # The last real token, on whichever side the padding is.
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
    raise ConfigError("unknown pooling", value=repr(pooling), limit="mean, cls, last, pooler, segments")
