"""GPT-J, CodeGen, GPT-NeoX Japanese, GPT-Neo and the first GPT: their softmax is a method of its own, ``_attn``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lmvae_fast.models.decoder.adapters.exchange import exchanges
from lmvae_fast.models.decoder.general_attention import attend


def _softmax(module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
    # Queries and keys may have come in float32 from their rotation.
    out = attend(module, query.to(value.dtype), key.to(value.dtype), value, **options)
    return out.transpose(1, 2), None


@exchanges("GPTJAttention", "CodeGenAttention", "GPTNeoXJapaneseAttention", method="_attn")
def scaled(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> tuple[Tensor, None]:
    """Scores over the square root of head_dim."""
    return _softmax(module, query, key, value)


@exchanges("GPTNeoSelfAttention", method="_attn")
def gpt_neo(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> tuple[Tensor, None]:
    """Scores as they are; every other layer sees a window."""
    window = module.config.window_size if module.attention_type == "local" else None
    return _softmax(module, query, key, value, scaling=1.0, window=window)


@exchanges("modeling_openai.Attention", method="_attn")
def gpt(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> list[Tensor]:
    """Scores over the square root of head_dim, if at all; keys come as ``[batch, heads, head_dim, tokens]``."""
    out, _weights = _softmax(module, query, key.transpose(2, 3), value, scaling=None if module.scale else 1.0)
    return [out]
