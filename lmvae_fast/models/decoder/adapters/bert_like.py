"""Decoders of BERT's build whose attention is written out: RemBERT, Megatron-BERT, BigBird (in full), GIT, RoFormer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lmvae_fast.models.decoder.adapters.exchange import exchanges
from lmvae_fast.models.decoder.general_attention import attend


@exchanges("RemBertSelfAttention", "MegatronBertSelfAttention", "BigBirdSelfAttention", "GitSelfAttention")
def bert_like(module: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Queries, keys and values by three linear maps, scores over the square root of head_dim."""
    return attend(module, *_heads(module, hidden_states)).flatten(2), None


@exchanges("RoFormerSelfAttention")
def roformer(
    module: Any, hidden_states: Tensor, attention_mask: Any = None, sinusoidal_pos: Any = None, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """The same, queries and keys (and values, if asked for) turned by their positions."""
    query, key, value = _heads(module, hidden_states)
    turn = module.apply_rotary_position_embeddings
    if module.rotary_value:
        query, key, value = turn(sinusoidal_pos, query, key, value)
    else:
        query, key = turn(sinusoidal_pos, query, key)
    return attend(module, query, key, value).flatten(2), None


def _heads(module: Any, hidden_states: Tensor) -> list[Tensor]:
    maps = (module.query, module.key, module.value)
    heads = (module.num_attention_heads, module.attention_head_size)
    return [map_(hidden_states).unflatten(-1, heads).transpose(1, 2) for map_ in maps]
