"""A module of sentence-transformers whose embeddings are posterior means.

``SentenceTransformer(modules=[PosteriorMean(model)])`` encodes, is evaluated and saved as any other, and is loaded with
``trust_remote_code=True``, which lets sentence-transformers import a class that is not its own. Tested with version 6.2.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.integrations.ours import checked_lmvae
from lmvae_fast.integrations.versions import warn_outside
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.optional import require

require(
    "sentence_transformers.base.modules",
    purpose="a module of sentence-transformers",
    extra="sentence-transformers",
)
from sentence_transformers.base.modules import InputModule  # noqa: E402 (after it is asked for)

warn_outside("sentence-transformers", "6.0", "7")


class PosteriorMean(InputModule):
    """Sentences to the means of their posteriors, ``[B, latent_dim]``.

    Args:
        model: an LMVAE of sentences without annotations, or a folder or hub name of one.

    Raises:
        ConfigError: a model of prompts, one that reads annotations beside the sentence, or what is no ``LMVAE``.
    """

    save_in_root = False  # a model folder holds nothing else
    config_keys: list[str] = []  # noqa: RUF012 (sentence-transformers' own way)

    def __init__(self, model: LMVAE | str | os.PathLike[str]):
        super().__init__()
        if isinstance(model, (str, os.PathLike)):
            model = LMVAE.from_pretrained(model)
        model = checked_lmvae(model, "PosteriorMean")
        if not isinstance(model.encoder, Encoder) or model.config.annotations:
            raise ConfigError(
                "embeddings are of sentences alone", value=f"system={model.config.system!r}, "
                f"annotations={model.config.annotations}", limit="a model that reads nothing but the sentence",
            )  # fmt: skip
        self.model = model

    @property
    def tokenizer(self) -> Any:
        """The encoder's tokenizer."""
        return self.model.encoder.tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        raise ConfigError("the tokenizer is the model's own", value=type(value).__name__)

    @property
    def max_seq_length(self) -> int:
        """The most of the decoder's tokens that are read of a sentence; longer ones are cut."""
        return self.model.config.max_len

    def get_embedding_dimension(self) -> int:
        """latent_dim."""
        return self.model.config.latent_dim

    def get_sentence_embedding_dimension(self) -> int:
        """latent_dim, by the name that older versions ask for."""
        return self.model.config.latent_dim

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """The encoder's ids and mask, int64 ``[B, S]``, of sentences as the model reads them (cut to max_len).

        Raises DataError for an empty sentence, or an input that is no string.
        """
        if not all(isinstance(text, str) for text in inputs):
            raise DataError("embeddings are of single sentences", value=type(next(iter(inputs), None)).__name__)
        texts = [(prompt or "") + text for text in inputs]
        batch = self.model.make_batch(self.model.tokenize(texts, on_empty="error"))
        assert batch.encoder_ids is not None and batch.encoder_mask is not None
        return {"input_ids": batch.encoder_ids, "attention_mask": batch.encoder_mask}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """``sentence_embedding`` ``[B, latent_dim]`` of ``input_ids`` and ``attention_mask``, differentiable in what trains."""
        pooled = self.model.encoder(features["input_ids"], features["attention_mask"])
        with torch.autocast(pooled.device.type, enabled=False):
            head = self.model.posterior_head
            mu = head(pooled.to(head.weight.dtype)).chunk(2, dim=-1)[0]
        return {**features, "sentence_embedding": mu}

    def get_config_dict(self) -> dict[str, Any]:
        return self.model.config.to_dict()

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the model's folder; nothing is ever pickled, so ``safe_serialization=False`` is a ConfigError."""
        if not safe_serialization:
            raise ConfigError("weights are safetensors only", value="safe_serialization=False")
        self.model.save_pretrained(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> PosteriorMean:  # type: ignore[override]
        """What :meth:`save` wrote, from a folder or the hub; options: of the download (token, revision, cache_folder ...)."""
        local = Path(model_name_or_path, subfolder)
        if not local.is_dir():
            download = {name: options[name] for name in _OF_THE_HUB if name in options}
            local = Path(str(cls.load_dir_path(model_name_or_path, subfolder=subfolder, **download)))
        return cls(local)


_OF_THE_HUB = ("token", "cache_folder", "revision", "local_files_only")
