"""Falcon: rotary positions, or ALiBi which is scaled together with the scores."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

from lmvae_fast.models.decoder.adapters.bloom import alibi_slopes
from lmvae_fast.models.decoder.adapters.exchange import exchanges
from lmvae_fast.models.decoder.general_attention import attend


@exchanges("FalconAttention")
def falcon(
    module: Any, hidden_states: Tensor, alibi: Tensor | None = None, *_: Any, position_embeddings: Any = None, **__: Any
) -> tuple[Tensor, None]:
    """Its projections as they are, its softmax ours; keys that were repeated for groups of heads stay repeated."""
    split = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (part.transpose(1, 2) for part in split)
    scale, slopes = 1 / math.sqrt(module.head_dim), None
    if alibi is None:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    else:
        slopes = alibi_slopes(module.num_heads, hidden_states.device) * scale
    out = attend(module, query, key, value, scaling=scale, slopes=slopes)
    return module.dense(out.flatten(2)), None
