"""Our attention for decoders that ask for more: sinks, values of another width than keys, biases by distance, or a context
that their keyword arguments do not carry. Decoders that need none of this never come here (attention.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface

from lmvae_fast.errors import UnsupportedDecoderError
from lmvae_fast.models.decoder.attention import (
    GENERAL,
    AttentionContext,
    RecordingAttention,
    refuse_unknown,
)
from lmvae_fast.models.decoder.position_columns import COLUMNS, key_columns, query_columns
from lmvae_fast.models.decoder.running import running


def general_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    lmvae: AttentionContext | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """As `latent_attention_forward`; also from outside of a keyword's reach, with sinks, and for values of another width."""
    refuse_unknown(module, dropout, other)
    out = attend(
        module, query, key, value, scaling=scaling, window=sliding_window, softcap=softcap, sinks=s_aux, context=lmvae
    )
    return out, None


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    context: Any = None,
) -> Tensor:
    """What an adapter calls in the place of a module's softmax.

    Args:
        module: the attention module, which says its ``layer_idx``.
        query: ``[1, heads, T, head_dim]``. key, value: ``[1, kv_heads, T, head_dim]``, of any two widths.
        scaling: the factor on scores; head_dim ** -0.5 if None. window, softcap, sinks: as `latent_attention` takes them.
        slopes: ``[heads]``, ALiBi: slope * (position of the key) is added to every scaled score.
        context: of the call; the one under way (`running`) if None.

    Returns:
        ``[1, T, heads, width of the values]``.
    """
    call = running()
    if context is None and call is not None:
        context = call.attention
    if context is None:
        raise UnsupportedDecoderError(
            "this decoder's attention was handed over to lmvae_fast",
            remedy="call it through LMVAE; set_attn_implementation('sdpa') gives it back, and takes it away from LMVAE",
        )
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedDecoderError(f"{type(module).__name__} does not say which layer it is (layer_idx)")
    if isinstance(context, RecordingAttention):
        context.modules[layer] = module
        context.widths[layer] = (key.shape[-1], value.shape[-1])
        context.sinks, context.columns = context.sinks or sinks is not None, context.columns or slopes is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # [1, heads, T, D] -> [T, heads, D]: views; the kernel reads strides.
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    values = v.shape[-1]
    if slopes is not None:
        assert call is not None
        columns = query_columns(slopes, scale, q.dtype)
        q = torch.cat([q, columns.expand(*q.shape[:-1], COLUMNS)], dim=-1)
        where = key_columns(call.positions, k.dtype)
        k = torch.cat([k, where.unsqueeze(1).expand(*k.shape[:-1], COLUMNS)], dim=-1)
    # One width for all: zeros add nothing to a score, and what they give as values is cut off again.
    width = max(k.shape[-1], values)
    q, k, v = (x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    extra = {} if sinks is None else {"sinks": sinks}
    out = context.attend(layer, q, k, v, scale=scale, window=window, softcap=softcap, **extra)
    return out[..., :values].unsqueeze(0)


AttentionInterface.register(GENERAL, general_attention_forward)
