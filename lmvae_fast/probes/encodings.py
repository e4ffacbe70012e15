"""What a model makes of sentences: posteriors, and its encoder's own vectors; kept on disk by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmvae_fast.errors import ConfigError
from lmvae_fast.files import fingerprint_tensors
from lmvae_fast.models.checks import check_posterior
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.modes import evaluating
from lmvae_fast.models.posterior import Posterior
from lmvae_fast.probes.results import Array
from lmvae_fast.training.feature_cache import TensorCache, content_key, tokenizer_fingerprint


@dataclass(frozen=True)
class Encodings:
    """N sentences as a model sees them.

    Attributes:
        texts: the sentences as they were read (cut to the model's length).
        mu, logvar: the posteriors, float32 ``[N, latent_dim]`` on the CPU.
        pooled: the encoder's own vectors, float32 ``[N, width]``: what the posterior was made of, the ceiling of a probe.
        annotations: pooled labels ``[N, labels]`` of a model that reads them, or None.
        report: what tokenisation did.
    """

    texts: list[str]
    mu: Tensor
    logvar: Tensor
    pooled: Tensor
    annotations: Tensor | None
    report: dict[str, int]

    def __len__(self) -> int:
        return len(self.texts)

    def means(self) -> Array:
        """Posterior means, float64 ``[N, latent_dim]``."""
        return self.mu.double().numpy()

    def sample(self, seed: int) -> Array:
        """One draw of each posterior, float64 ``[N, latent_dim]``; the same for a seed."""
        return Posterior(self.mu, self.logvar).sample(seed=seed).double().numpy()

    def ceiling(self) -> Array:
        """The encoder's own vectors, float64 ``[N, width]``."""
        return self.pooled.double().numpy()


def encode(
    model: Any,
    sentences: Sequence[Any],
    *,
    cache: str | Path | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Encodings:
    """Encode sentences in evaluation mode, without gradients; longer ones are cut at the model's ``max_len``.

    Args:
        model: an LMVAE of sentences.
        sentences: strings, or Examples with the labels that the model reads; none empty.
        cache: folder of earlier encodings; None keeps none. An entry's key is made of the encoder's and the posterior head's
            weights, both tokenizers and the sentences, so what changed is encoded anew.
        batch_size: sentences per pass.
        progress: called with the number of sentences done after every batch.

    Raises:
        ConfigError: a model of prompts with responses. DataError: no sentence, an empty one, or one without labels that the
            model reads.
    """
    if not isinstance(getattr(model, "encoder", None), Encoder):
        raise ConfigError(
            "probes read sentences; this model reads prompts with responses", value=f"system={model.config.system!r}",
            remedy="probe a model of sentences, or its latents with the functions of lmvae_fast.probes",
        )  # fmt: skip
    tokenized = model.tokenize(sentences, on_long="truncate", on_empty="error")
    done = progress or (lambda count: None)

    def compute() -> dict[str, Tensor]:
        with evaluating(model):
            pooled = model.pool(tokenized, batch_size=batch_size, progress=done)
            parts = []
            for start in range(0, len(tokenized), batch_size):
                rows = range(start, min(start + batch_size, len(tokenized)))
                parts.append(model.encode(model.make_batch(tokenized, rows, pooled).to(model.device)))
        mu, logvar = (torch.cat([getattr(part, name) for part in parts]).cpu() for name in ("mu", "logvar"))
        check_posterior(mu, logvar, tokenized.source_rows)
        return {"mu": mu.float(), "logvar": logvar.float(), "pooled": pooled.float()}

    if cache is None:
        found = compute()
    else:
        key = content_key(sentences=tokenized.fingerprint(), model=encoding_fingerprint(model))
        found = TensorCache(Path(cache)).get("encodings", key, compute)
    return Encodings(list(tokenized.texts), found["mu"], found["logvar"], found["pooled"], tokenized.annotations,
                     dict(tokenized.report))  # fmt: skip


def encoding_fingerprint(model: Any) -> str:
    """sha256 of all that decides a sentence's posterior."""
    return content_key(
        encoder=model.encoder.fingerprint(),
        head=fingerprint_tensors(dict(model.posterior_head.state_dict())),
        tokenizers=[tokenizer_fingerprint(part.tokenizer) for part in (model.encoder, model.decoder.tokenizer)],
        annotations=model.config.annotations,
        max_len=model.config.max_len,
    )


def texts_fingerprint(texts: Sequence[str]) -> str:
    """sha256 of sentences in order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def decode(
    model: Any,
    latents: Array | Tensor,
    annotations: Tensor | None,
    progress: Callable[[int], None] | None = None,
    batch_size: int = 64,
) -> list[str]:
    """Greedy text of latents ``[N, latent_dim]``, without outer spaces, in blocks so that a bar can move."""
    z = torch.from_numpy(np.ascontiguousarray(latents)) if isinstance(latents, np.ndarray) else latents
    z = z.to(device=model.device, dtype=model.posterior_head.weight.dtype)
    block = max(batch_size * 4, 1)
    found: list[str] = []
    for start in range(0, len(z), block):
        options: dict[str, Any] = {"batch_size": batch_size}
        if model.config.conditional_decoder and annotations is not None:
            options["annotations"] = annotations[start : start + block]
        found += [text.strip() for text in model.decode(z[start : start + block], **options)]
        if progress is not None:
            progress(len(z[start : start + block]))
    return found
