"""From logits to the next token of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from lmvae_fast.config import GenerationConfig
from lmvae_fast.kernels import philox


def filtered_probabilities(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities ``[batch, vocabulary]`` (float32) after temperature, then top-k, then top-p (nucleus).

    ``top_k`` 0 keeps all; ``top_p`` keeps the fewest tokens, most probable first, whose probabilities reach it.
    """
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_k:
        kth = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < kth, 0.0)
    if top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        total = ordered.sum(-1, keepdim=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p * total, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return probabilities / probabilities.sum(-1, keepdim=True)


def select_tokens(
    logits: Tensor, config: GenerationConfig, *, seed: int | None, sentence: Tensor, step: Tensor
) -> Tensor:
    """Next tokens, int64 ``[batch]``: the most probable, or drawn.

    The draw of a sentence depends on (seed, sentence, step) only: block ``sentence`` of the Philox stream (seed, step)
    gives one uniform, and the token is where the running sum of probabilities passes it. So a sentence's text does not
    depend on the batch it is decoded in. ``sentence`` and ``step``: int64 ``[batch]``.
    """
    if not config.do_sample or seed is None:
        return logits.argmax(-1)
    probabilities = filtered_probabilities(
        logits, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
    )
    key = philox.seed_tensor(seed, "cpu")[0]
    words = philox.block_words(key, step, sentence)
    # 48 random bits: a vocabulary of 150,000 has tails that 24 bits would never reach.
    uniform = ((words[:, 0] >> 8).double() * 2.0**24 + (words[:, 1] >> 8).double()) * 2.0**-48
    running = probabilities.double().cumsum(-1)
    target = uniform.to(logits.device).unsqueeze(-1) * running[:, -1:]
    # right=True: a uniform of 0 must not choose a token of probability 0 in front.
    return torch.searchsorted(running, target, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
