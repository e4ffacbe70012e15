"""How probable given texts are under given latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmvae_fast.errors import DataError
from lmvae_fast.models.batch import Batch, pack
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.modes import evaluating


def score(model: LMVAE, latents: Tensor, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
    """ln p(text | z) of each text under the latent of its row, in nats: float32 ``[N]`` on the CPU.

    One parallel pass per batch, teacher forced. The end token counts as part of a text that leaves room for it within
    ``max_len`` tokens, whatever objective the model was trained under.

    Args:
        model: any LMVAE whose decoder takes no labels.
        latents: ``[N, latent_dim]``, finite.
        texts: N sentences of at most ``max_len`` tokens.
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
        return torch.empty(0)
    sentences = model.tokenize(texts, on_long="error", on_empty="error")
    weight = model.posterior_head.weight
    parts = []
    with evaluating(model):
        for start in range(0, len(texts), batch_size):
            ids = sentences.ids[start : start + batch_size]
            z = latents[start : start + batch_size].to(weight)
            parts.append(-model.score(_batch(model, ids).to(weight.device), z).float().cpu())
    return torch.cat(parts)


def _batch(model: LMVAE, ids: Sequence[list[int]]) -> Batch:
    """Sentences to be predicted, and nothing for an encoder."""
    tokenizer = model.decoder.tokenizer
    labels = [[*sentence, tokenizer.eos_token_id][: model.config.max_len] for sentence in ids]
    inputs = [[tokenizer.bos_token_id, *sentence[:-1]] for sentence in labels]
    lengths = torch.tensor([len(sentence) for sentence in labels])
    return Batch(**pack(inputs, labels), tokens=lengths, indices=torch.arange(len(labels)))  # type: ignore[arg-type]
