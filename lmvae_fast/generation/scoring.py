"""How probable given texts are under given latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.errors import DataError
from lmvae_fast.models.inputs import batch_to_score
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.modes import evaluating


def score(model: LMVAE, latents: Tensor, texts: Sequence[Any], *, batch_size: int = 64) -> Tensor:
    """ln p(text | z) of each text under the latent of its row, in nats: float32 ``[N]`` on the CPU; of a model of prompts,
    ln p(response | prompt, z).

    One parallel pass per batch, teacher forced. The end token counts as part of a text that leaves room for it within
    ``max_len`` tokens, whatever objective the model was trained under. Differentiable in the latents where they require a
    gradient.

    Args:
        model: any LMVAE whose decoder takes no labels.
        latents: ``[N, latent_dim]``, finite.
        texts: N sentences, or prompts with responses, of at most ``max_len`` tokens (a response's alone).
        batch_size: sentences per pass.

    Raises:
        LatentError: latents of another shape or dtype, or with NaN or Inf; a decoder that needs labels.
        DataError: another number of texts than latents; an empty or too long one.
    """
    model.check_latents(latents)
    if isinstance(texts, str) or len(texts) != latents.shape[0]:
        value = "one string" if isinstance(texts, str) else f"{len(texts)} texts"
        raise DataError("every text needs a latent of its own", value=value, limit=f"{latents.shape[0]} texts")
    if not len(texts):
        return torch.empty(0, dtype=torch.float32)
    sentences = model.tokenize(texts, on_long="error", on_empty="error")
    weight = model.posterior_head.weight
    parts = []
    with evaluating(model), torch.set_grad_enabled(latents.requires_grad):
        for start in range(0, len(texts), batch_size):
            rows = range(start, min(start + batch_size, len(texts)))
            z = latents[rows.start : rows.stop].to(weight)
            batch = batch_to_score(sentences, rows, model.config, model.decoder).to(weight.device)
            parts.append(-model.score(batch, z).float().cpu())
    return torch.cat(parts)
