"""The start of a whitened posterior, from the features of the sentences that a run is about to learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmvae_fast.models.modes import evaluating
from lmvae_fast.models.posterior_head import WhitenedHead
from lmvae_fast.text.tokenizer import TokenizedSentences

#: Sentences that are encoded for it where the encoder trains, so that no features of all of them are at hand.
MOST = 4096


def start_posterior(model: Any, sentences: TokenizedSentences, pooled: Tensor | None) -> None:
    """Fit a whitened posterior head that has no start yet; any other is left as it is.

    pooled: features of all sentences ``[N, width]``, or None of an encoder that trains, which then reads some of them.
    Raises DataError where the features are those of one sentence.
    """
    head = getattr(model, "posterior_head", None)
    if not isinstance(head, WhitenedHead) or head.fitted:
        return
    rows = torch.arange(len(sentences))
    if pooled is None:
        rows = torch.arange(0, len(sentences), max(len(sentences) // MOST, 1))[:MOST]
        with evaluating(model):
            texts, lengths = ([part[row] for row in rows] for part in (sentences.spelled, sentences.lengths))
            pooled = model.encoder.pool_texts(texts, lengths)
    if sentences.annotations is not None and model.config.annotations:
        pooled = torch.cat([pooled, sentences.annotations[rows].to(pooled)], dim=1)
    head.fit(pooled)
