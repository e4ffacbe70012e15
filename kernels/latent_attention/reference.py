"""Latent attention in plain torch: pad, mask, softmax. The truth that every faster form is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from .visibility import visibility_mask


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
    sinks: Tensor | None = None,
) -> Tensor:
    """Same contract as ``op.latent_attention``; accumulates in fp32 (fp64 for fp64 inputs) and rounds once, at the end.

    No step synchronises the host; without ``max_seqlen`` sentences are padded to all T tokens.
    """
    tokens, heads, head_dim = q.shape
    batch, kv_heads = cu_seqlens.numel() - 1, k.shape[1]
    if tokens == 0:  # nothing, but of all inputs: their gradients are zeros and not missing
        given = [x for x in (k, v, memory_k, memory_v) if x is not None]
        return q + sum(x.sum() * 0 for x in given)
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    device = q.device
    if max_seqlen is None:
        max_seqlen = tokens
    start = cu_seqlens[:-1].long().unsqueeze(1)
    length = cu_seqlens[1:].long().unsqueeze(1) - start
    index = torch.arange(max_seqlen, device=device)
    real = index < length  # [B, S]
    rows = (start + index).clamp(max=tokens - 1).flatten()

    def pad(x: Tensor) -> Tensor:
        """[T, h, D] -> [B, h, S, D], zero beyond a sentence's end so that no neighbour's Inf or NaN leaks in."""
        padded = x.index_select(0, rows).view(batch, max_seqlen, *x.shape[1:]).to(compute)
        return padded.masked_fill(~real[:, :, None, None], 0).transpose(1, 2)

    queries, keys, values = pad(q), pad(k), pad(v)
    slots = 0 if memory_k is None else memory_k.shape[2]
    if memory_k is not None and memory_v is not None:
        keys = torch.cat([memory_k.to(compute), keys], dim=2)
        values = torch.cat([memory_v.to(compute), values], dim=2)
    queries = queries.reshape(batch, kv_heads, heads // kv_heads, max_seqlen, head_dim)
    scores = torch.einsum("bhgsd,bhnd->bhgsn", queries, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = visibility_mask(max_seqlen, slots, visibility, window, device=device)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = _softmax(scores, None if sinks is None else sinks.view(kv_heads, -1, 1))
    out = torch.einsum("bhgsn,bhnd->bshgd", weights, values).flatten(2, 3)  # [B, S, H, Dv]
    owner = torch.searchsorted(cu_seqlens, torch.arange(tokens, device=device, dtype=torch.int32), right=True) - 1
    place = torch.arange(tokens, device=device) - start.squeeze(1).index_select(0, owner)
    return out.flatten(0, 1).index_select(0, owner * max_seqlen + place).to(q.dtype)


def latent_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Same contract as ``op.latent_attention_decode``; accumulates in fp32 (fp64 for fp64 inputs)."""
    batch, heads, head_dim = q.shape
    kv_heads, positions = k_cache.shape[1], k_cache.shape[2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    position, length = torch.arange(positions, device=q.device), lengths.long().unsqueeze(1)
    visible = position < length
    if window is not None:
        visible = visible & (position >= length - window)
    values = v_cache.to(compute).masked_fill(~visible[:, None, :, None], 0)  # what is stale may be Inf or NaN
    queries = q.to(compute).reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("bhgd,bhnd->bhgn", queries, k_cache.to(compute)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    weights = _softmax(scores, None if sinks is None else sinks.view(kv_heads, -1))
    out = torch.einsum("bhgn,bhnd->bhgd", weights, values).flatten(1, 2)
    return out.masked_fill((lengths <= 0)[:, None, None], 0).to(q.dtype)  # a row that holds nothing: zeros, not NaN


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension; sinks, of the shape of a row before it, enter its sum and give no weight."""
    if sinks is None:
        return scores.softmax(-1)
    sinks = sinks.to(scores.dtype).expand(scores.shape[:-1]).unsqueeze(-1)
    return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
