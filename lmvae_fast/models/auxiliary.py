"""What an objective may add to the reconstruction and the KL: words from latents alone, and contrast between responses.

Of CVAE with G-Skip (IEEE TAI 7(2), 2026; behaviour of zhangjf-nlp/LLM-based-CVAE).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.models.latent_heads import BagOfWordsHead
from lmvae_fast.models.latents import Latents, Noise, Seed, draw_latents, noise_of, stream
from lmvae_fast.models.posterior import Posterior, draw
from lmvae_fast.models.prompt_objective import contrast_loss, turned_rows, word_weights
from lmvae_fast.text.batch import Batch


def words_loss(head: BagOfWordsHead, batch: Batch, posterior: Posterior, noise: Noise | None, seed: Seed) -> Tensor:
    """Mean negative log-likelihood of a group's words, each under a draw of its own, averaged over the responses; a scalar."""
    targets = torch.arange(batch.num_tokens, device=batch.rows.device) if batch.targets is None else batch.targets
    given = noise_of(noise, "bow", batch.batch_size)
    z = draw(posterior, batch.max_seqlen, noise=given, seed=stream(seed, "bow"), share=batch.share)
    z = z[batch.token_index[targets], batch.rows[targets]]
    return head(z, batch.labels[targets], word_weights(batch))


def told_apart_loss(
    score: Callable[[Latents], Tensor],
    own: Tensor,
    config: LMVAEConfig,
    batch: Batch,
    posterior: Posterior,
    noise: Noise | None,
    seed: Seed,
) -> Tensor:
    """How badly responses tell their own posterior from the others of their group; a scalar, one decoder pass for each other.

    score: log-likelihood ``[B]`` of the responses under latents; own: under their own.
    """
    scores = [own]
    for turn in range(1, batch.max_group):
        rows, there = turned_rows(batch, turn)
        other = Posterior(posterior.mu[rows], posterior.logvar[rows])
        latents = draw_latents(config, other, batch, beta=0.0, noise=noise, seed=seed, turn=turn)
        scores.append(torch.where(there, score(latents), -torch.inf))
    return contrast_loss(scores)
