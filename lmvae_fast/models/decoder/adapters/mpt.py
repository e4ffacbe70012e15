"""MPT: ALiBi with slopes of its own, and queries, keys and values that may be clamped."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.models.decoder.adapters.exchange import exchanges
from lmvae_fast.models.decoder.general_attention import attend


def mpt_slopes(heads: int, device: torch.device, largest: float = 8.0) -> Tensor:
    """Slopes ``[heads]``, float32: 2^(-largest k / n), n the power of two not below ``heads``; even k before odd ones."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** (-largest * (k + 1) / power) for k in range(power)]
    if power != heads:
        slopes = (slopes[1::2] + slopes[::2])[:heads]
    return torch.tensor(slopes, device=device)


@exchanges("MptAttention")
def mpt(module: Any, hidden_states: Tensor, position_bias: Any = None, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Its projections as they are, its softmax ours."""
    mixed = module.Wqkv(hidden_states)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (part.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for part in mixed.chunk(3, dim=2))
    slopes = None if position_bias is None else mpt_slopes(module.n_heads, hidden_states.device)
    out = attend(module, query, key, value, scaling=module.softmax_scale, slopes=slopes)
    return module.out_proj(out.flatten(2)), None
