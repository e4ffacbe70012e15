"""`pipeline("text2latent")` and `pipeline("latent2text")`: sentences to posterior means, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Pipeline

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError, DataError, LatentError
from lmvae_fast.models.lmvae import LMVAE


class _Whole(Pipeline):
    """A pipeline whose items are one batch to the engine, which makes batches of its own."""

    # Nothing but the model is loaded from a folder.
    _load_tokenizer: Any = False
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False

    @property
    def lmvae(self) -> LMVAE:
        """The model of ours."""
        model: Any = self.model
        return model.lmvae

    def __call__(self, inputs: Any, *_: Any, **options: Any) -> Any:
        if options.pop("batch_size", None) is not None:
            raise ConfigError("the engine makes its own batches", value="batch_size", remedy="leave batch_size out")
        one = self._is_one(inputs)
        before, run, after = self._sanitize_parameters(**options)
        items = [inputs] if one else list(inputs)
        if not items:
            return []
        with torch.no_grad():
            out = self.postprocess(self._forward(self.preprocess(items, **before), **run), **after)
        return out[0] if one else out

    def _is_one(self, inputs: Any) -> bool:
        raise NotImplementedError


class Text2Latent(_Whole):
    """Sentences to posterior means: a list of ``latent_dim`` floats for each, or with ``return_tensors=True`` a tensor."""

    def _is_one(self, inputs: Any) -> bool:
        return isinstance(inputs, str)

    def _sanitize_parameters(self, return_tensors: bool = False, **unknown: Any) -> tuple[dict, dict, dict]:
        if unknown:
            raise ConfigError("text2latent has no such option", value=", ".join(unknown), limit="return_tensors")
        return {}, {}, {"return_tensors": return_tensors}

    def preprocess(self, inputs: list[str], **_: Any) -> list[str]:  # type: ignore[override]
        if not all(isinstance(text, str) for text in inputs):
            raise DataError("text2latent takes sentences", limit="a string, or a list of strings")
        return inputs

    def _forward(self, texts: Any, **_: Any) -> Any:  # type: ignore[override]
        return self.lmvae.encode(texts).mu

    def postprocess(self, mu: Any, return_tensors: bool = False, **_: Any) -> Any:  # type: ignore[override]
        return mu.cpu() if return_tensors else mu.tolist()


class Latent2Text(_Whole):
    """Latents ``[N, latent_dim]`` (a tensor, an array, lists) to sentences; options are the fields of GenerationConfig."""

    def _is_one(self, inputs: Any) -> bool:
        return np.ndim(inputs[0]) == 0 if len(inputs) else False

    def _sanitize_parameters(self, **options: Any) -> tuple[dict, dict, dict]:
        GenerationConfig.from_dict(options)
        return {}, options, {}

    def preprocess(self, inputs: list[Any], **_: Any) -> Tensor:  # type: ignore[override]
        try:
            return torch.stack([torch.as_tensor(row, dtype=torch.float32) for row in inputs]).to(self.model.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise LatentError(f"latent2text takes latents of one width: {error}") from error

    def _forward(self, z: Any, **options: Any) -> Any:  # type: ignore[override]
        return self.lmvae.decode(z, **options)

    def postprocess(self, texts: Any, **_: Any) -> Any:  # type: ignore[override]
        return texts
