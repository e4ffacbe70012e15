"""Beam search: the most probable sentence that a few partial sentences kept at every step lead to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmvae_fast.config import GenerationConfig
from lmvae_fast.generation.decode_rows import check_finite
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.decoder.prefill import read
from lmvae_fast.models.injection import Injection


@dataclass(frozen=True)
class Sentence:
    """A complete sentence of a search: its ids without the end token, its score, and the end or stop token that ended it, or
    None."""

    ids: list[int]
    score: float
    end: int | None


def search(
    decoder: Decoder,
    injection: Injection,
    prompts: list[tuple[int, ...]],
    config: GenerationConfig,
    limit: int,
    *,
    first_index: int = 0,
    read_first: list[tuple[int, ...]] | None = None,
) -> list[Sentence]:
    """The best sentence of each latent under ``config.num_beams`` beams, of at most ``limit`` tokens.

    A step extends every beam by every token and keeps the ``num_beams`` most probable extensions that do not end; those
    that end while they rank among the first ``num_beams`` are set aside. A latent is done when no extension of its beams
    can surpass the worst of ``num_beams`` sentences set aside. ``prompts``: none, or one per latent.
    ``first_index``: index of the first latent, for messages. ``read_first``: what is read before each sentence, where it is
    not the start token and its prompt. Raises NumericalError for hidden states that are not finite,
    and logits of which none is the greatest.
    """
    latents, width = injection.batch_size, config.num_beams
    device = decoder.device
    rows = torch.arange(latents, device=device).repeat_interleave(width)
    begins = read_first or [(decoder.tokenizer.bos_token_id, *prompt) for prompt in prompts or [()] * latents]
    longest = max(len(ids) - 1 for ids in begins) if begins else 0
    cache = decoder.new_cache(injection, batch=latents * width, max_tokens=limit + longest)
    for beam in range(width):
        cache.place(torch.arange(latents, device=device) * width + beam, injection)
    spread = Injection(
        injection.visibility,
        None if injection.memory is None else cache.memory,
        *(None if part is None else part[rows] for part in (injection.embedding_shift, injection.output_residual)),
    )
    if longest:  # read by the first beam of each latent, for all
        read(decoder, cache, injection, range(0, latents * width, width), [ids[:-1] for ids in begins])
        cache.reorder(rows * width)
    token = torch.tensor([ids[-1] for ids in begins], device=device)[rows]
    stops = {decoder.tokenizer.eos_token_id, *config.stop_tokens}
    # All beams of a latent are one at first: only the first counts.
    scores = torch.full((latents, width), -torch.inf, device=device)
    scores[:, 0] = 0.0
    beams: list[list[list[int]]] = [[[] for _ in range(width)] for _ in range(latents)]
    aside: list[list[Sentence]] = [[] for _ in range(latents)]
    for length in range(1, limit + 1):
        logprobs = decoder.step(token, cache, spread).float().log_softmax(-1).view(latents, width, -1)
        if length <= config.min_new_tokens:
            logprobs[..., list(stops)] = -torch.inf
        best, place = _extensions(scores, logprobs, (1 + len(stops)) * width)
        origins, tokens = [], []
        for latent in range(latents):
            kept: list[tuple[float, int, int]] = []
            kept_beams: list[list[int]] = []
            for rank, (score, at) in enumerate(zip(best[latent], place[latent], strict=True)):
                beam, chosen = divmod(at, logprobs.shape[-1])
                if chosen in stops:
                    if rank < width and score > -torch.inf:
                        value = score / length**config.length_penalty
                        aside[latent].append(Sentence(beams[latent][beam], value, chosen))
                elif len(kept) < width:
                    kept.append((score, latent * width + beam, chosen))
                    kept_beams.append([*beams[latent][beam], chosen])
            while len(kept) < width:  # a vocabulary smaller than the beam
                kept.append((-torch.inf, latent * width, 0))
                kept_beams.append(kept_beams[0] if kept_beams else [])
            beams[latent] = kept_beams
            scores[latent] = torch.tensor([score for score, _, _ in kept], device=device)
            origins += [origin for _, origin, _ in kept]
            tokens += [chosen for _, _, chosen in kept]
        live = scores.tolist()
        if all(_settled(aside[latent], live[latent], config, limit) for latent in range(latents)):
            break
        cache.reorder(torch.tensor(origins, device=device))
        token = torch.tensor(tokens, device=device)
    for latent, finite in enumerate(cache.finite.view(latents, width).all(1).tolist()):
        check_finite(finite, first_index + latent)
    for latent, row in enumerate(scores.tolist()):
        for so_far, score in zip(beams[latent], row, strict=True):
            if len(so_far) == limit and score > -torch.inf:
                aside[latent].append(Sentence(so_far, score / limit**config.length_penalty, None))
    return [max(found, key=lambda sentence: sentence.score) for found in aside]


def _extensions(scores: Tensor, logprobs: Tensor, count: int) -> tuple[list[list[float]], list[list[int]]]:
    """The ``count`` most probable extensions of each latent's beams: their scores, and beam * vocabulary + token."""
    total = (scores.unsqueeze(-1) + logprobs).flatten(1)
    best, place = total.topk(min(count, total.shape[1]), dim=-1)
    return best.tolist(), place.tolist()


def _settled(aside: list[Sentence], live: list[float], config: GenerationConfig, limit: int) -> bool:
    """Whether no live beam can surpass the worst of the sentences that count."""
    if len(aside) < config.num_beams:
        return False
    worst = sorted((sentence.score for sentence in aside), reverse=True)[config.num_beams - 1]
    # Scores only fall and are negative, so the most that a beam can reach is its score now over the greatest length.
    return max(live) / limit**config.length_penalty <= worst
