"""The bare greedy loop: a fixed number of tokens for every latent, nothing stops early."""

from __future__ import annotations

import torch
from torch import Tensor

from lmvae_fast.models.decoders import Decoder
from lmvae_fast.models.injection import Injection


@torch.no_grad()
def greedy_ids(decoder: Decoder, injection: Injection, steps: int) -> Tensor:
    """The first ``steps`` greedy tokens of every latent, int64 ``[batch, steps]``; end tokens do not stop it.

    This is how LangVAE decodes, in training and in generation: what follows an end token is kept.
    """
    batch, device = injection.batch_size, decoder.device
    out = torch.empty(batch, steps, dtype=torch.int64, device=device)
    if steps == 0 or batch == 0:
        return out
    cache = decoder.new_cache(injection, batch=batch, max_tokens=steps)
    cache.place(torch.arange(batch, device=device), injection)
    token = torch.full((batch,), decoder.tokenizer.bos_token_id, dtype=torch.int64, device=device)
    for step in range(steps):
        token = decoder.step(token, cache, injection).argmax(-1)
        out[:, step] = token
    return out
