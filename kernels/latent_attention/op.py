"""Latent attention, as users call it."""

from __future__ import annotations

from torch import Tensor

from .checks import check_latent_attention, check_latent_attention_decode, check_lengths, check_offsets
from .reference import latent_attention_decode_reference, latent_attention_reference


def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    *,
    cu_seqlens: Tensor,
    visibility: str,
    scale: float,
    max_seqlen: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of packed sentences: each over its own memory slots and its own tokens. Differentiable.

    Args:
        q: [T, H, D], the packed sentences' queries; fp32, fp16, bf16 or fp64, any strides. D is 1 to 256.
        k, v: [T, Hkv, D], H a multiple of Hkv (grouped-query attention: query head h reads kv head h // (H / Hkv)).
        memory_k, memory_v: [B, Hkv, M, D], sentence b's slots; any strides, expanded views included; both None for
            plain causal attention.
        cu_seqlens: int32 [B + 1], sentence b is rows cu_seqlens[b] to cu_seqlens[b + 1] of q, k and v; empty ones are
            allowed.
        visibility: "prefix", "rolling" or "interleaved": who sees what, as in ``visibility.py``. The last two need M >=
            the longest sentence.
        scale: the factor on q . k, usually D ** -0.5.
        max_seqlen: the longest sentence's length or a bound on it. None: read from ``cu_seqlens``, which on CUDA
            waits for the device.
        window: a token sees the last ``window`` cache positions up to and including its own (``visibility.py``).
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2).

    Returns:
        [T, H, D], in the dtype of q. The gradient of every tensor is deterministic.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit. The values of ``cu_seqlens`` are
            checked on the CPU only; on CUDA that would wait for the device.
    """
    check_latent_attention(q, k, v, memory_k, memory_v, cu_seqlens, visibility, scale, max_seqlen, window, softcap)
    if q.device.type == "cpu":
        slots = 0 if memory_k is None else memory_k.shape[2]
        max_seqlen = check_offsets(cu_seqlens, q.shape[0], slots, visibility, max_seqlen)
    return latent_attention_reference(
        q,
        k,
        v,
        memory_k,
        memory_v,
        cu_seqlens=cu_seqlens,
        visibility=visibility,
        scale=scale,
        max_seqlen=max_seqlen,
        window=window,
        softcap=softcap,
    )


def latent_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One decoding step: one query per row over that row's visible cache positions. Not differentiable: for generation.

    Args:
        q: [B, H, D]; fp32, fp16, bf16 or fp64, any strides. D is 1 to 256.
        k_cache, v_cache: [B, Hkv, N, D], any strides, laid out as ``visibility.py`` says: whatever the rule, what the
            newest token sees is positions 0 to lengths - 1. What lies beyond is never used, be it Inf or NaN.
        lengths: int32 or int64 [B], 0 to N; a row of length 0 gives zeros.
        scale, window, softcap: as in ``latent_attention``; the window keeps the last ``window`` visible positions.

    Returns:
        [B, H, D], in the dtype of q.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit. The values of ``lengths`` are
            checked on the CPU only.
    """
    check_latent_attention_decode(q, k_cache, v_cache, lengths, scale, window, softcap)
    if q.device.type == "cpu":
        check_lengths(lengths, k_cache.shape[2])
    return latent_attention_decode_reference(q, k_cache, v_cache, lengths, scale=scale, window=window, softcap=softcap)
