"""Bloom: ALiBi, added to scaled scores; slopes come as a bias ``[heads, 1, T]`` of the positions 0, 1, 2, ..."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from lmvae_fast.models.decoder.adapters.exchange import exchanges
from lmvae_fast.models.decoder.general_attention import attend


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """Slopes ``[heads]``, float32: powers of 2^(-8/n) for n the power of two below ``heads``, then odd powers of its root."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 / power * (head + 1)) for head in range(power)]
    slopes += [2 ** (-4 / power * (2 * head + 1)) for head in range(heads - power)]
    return torch.tensor(slopes, device=device)


@exchanges("BloomAttention")
def bloom(module: Any, hidden_states: Tensor, residual: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Its projections and residual as they are, its softmax ours."""
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    slopes = alibi_slopes(module.num_heads, hidden_states.device)
    out = attend(module, query, key, value, scaling=module.inv_norm_factor, slopes=slopes)
    out = module.dense(out.flatten(2))
    return residual + dropout(out, module.hidden_dropout, module.training), None
