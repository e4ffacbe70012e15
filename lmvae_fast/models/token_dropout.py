"""Token dropout: what a decoder reads in training with some tokens taken away, so that it has to ask its latent for them.

Source: Bowman et al. 2016 (arXiv 1511.06349, section 3.2), "word dropout".
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from lmvae_fast.models.latents import Noise, Seed, noise_of, stream
from lmvae_fast.models.posterior import Posterior, draw
from lmvae_fast.text.batch import Batch
from lmvae_fast.text.tokenizer import SentenceTokenizer


def dropped_tokens(
    batch: Batch, rate: float, most: int, tokenizer: SentenceTokenizer, noise: Noise | None, seed: Seed
) -> Tensor:
    """The batch's decoder inputs, int64 ``[T]``, each token but a sentence's first replaced with probability ``rate`` (over 0):
    by the unknown token, or by the start token of a vocabulary that has none.

    most: tokens that any sentence may have. noise: standard normal draws ``tokens`` ``[B, most]``, for comparisons; a token
    below the ``rate`` quantile goes. Else from ``seed``: a sentence loses the same tokens however its batch is filled up, and
    however many processes share it.
    """
    # Normal draws by row are what a batch's processes and recorded steps agree on already
    even = Posterior(*torch.zeros(2, batch.batch_size, most, device=batch.rows.device).unbind())
    given = noise_of(noise, "tokens", batch.batch_size)
    drawn = draw(even, 1, noise=given, seed=stream(seed, "tokens"), share=batch.share)[0]
    gone = (drawn[batch.rows, batch.token_index] < NormalDist().inv_cdf(rate)) & (batch.token_index > 0)
    unknown = tokenizer.bos_token_id if tokenizer.unknown_id is None else tokenizer.unknown_id
    return torch.where(gone, unknown, batch.input_ids)
