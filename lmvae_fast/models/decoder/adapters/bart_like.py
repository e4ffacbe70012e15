"""Decoders of BART's build whose attention is written out: XGLM, MVP, TrOCR."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lmvae_fast.errors import UnsupportedDecoderError
from lmvae_fast.models.decoder.adapters.exchange import exchanges
from lmvae_fast.models.decoder.general_attention import attend


@exchanges("XGLMAttention", "MvpAttention", "TrOCRAttention")
def bart_like(
    module: Any, hidden_states: Tensor, key_value_states: Any = None, *_: Any, attn_prompt: Any = None, **__: Any
):
    """Queries, keys and values by three linear maps, scores over the square root of head_dim."""
    if key_value_states is not None or attn_prompt is not None:
        raise UnsupportedDecoderError(f"{type(module).__name__} attends to an encoder's states or a prompt of its own")
    maps = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (
        map_(hidden_states).unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2) for map_ in maps
    )
    out = attend(module, query, key, value, scaling=module.scaling)
    return module.out_proj(out.flatten(2)), None
