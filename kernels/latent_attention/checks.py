"""Argument checks of latent attention: every bad input is named, with both sizes, before any kernel runs."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .visibility import check_visibility, visibility_code

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensors(**arguments: object) -> None:
    """TypeError for what is not a tensor; only memory_k and memory_v may be None."""
    for name, x in arguments.items():
        if not isinstance(x, Tensor) and not (x is None and name in ("memory_k", "memory_v")):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def _check_floating(**tensors: Tensor | None) -> None:
    """All on one device, in one supported floating dtype."""
    given = {name: x for name, x in tensors.items() if x is not None}
    first_name, first = next(iter(given.items()))
    for name, x in given.items():
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
        if x.dtype != first.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, {first_name} has {first.dtype}: they must be the same")
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}, {first_name} on {first.device}: they must be on one device")


def _check_rank(rank: int, layout: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dim() != rank:
            raise ValueError(f"{name} must be {layout} (rank {rank}), got shape {tuple(x.shape)}")


def _check_scores(scale: float, window: int | None, softcap: float | None) -> None:
    if not -math.inf < scale < math.inf:  # not math.isfinite: a graph may hold the number as a symbol
        raise ValueError(f"scale must be finite, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a token sees itself), got {window}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be finite and above 0 (None for none), got {softcap}")


def _check_integer(
    name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], size: int | None, device: torch.device
) -> None:
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {x.dtype}")
    if x.dim() != 1 or (size is not None and x.numel() != size):
        raise ValueError(f"{name} must have shape ({'n' if size is None else size},), got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, q on {device}: they must be on one device")


def check_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    cu_seqlens: Tensor,
    visibility: str,
    scale: float,
    max_seqlen: int | None,
    window: int | None,
    softcap: float | None,
) -> None:
    """Everything that can be checked without reading device memory."""
    if (memory_k is None) != (memory_v is None):
        raise ValueError("memory_k and memory_v must both be given or both be None")
    _check_floating(q=q, k=k, v=v, memory_k=memory_k, memory_v=memory_v)
    _check_rank(3, "[tokens, heads, head_dim]", q=q, k=k, v=v)
    _check_scores(scale, window, softcap)
    visibility_code(visibility)
    tokens, heads, head_dim = q.shape
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[0] != tokens or k.shape[2] != head_dim:
        raise ValueError(f"k must be [tokens {tokens}, kv_heads, head_dim {head_dim}] as q is, got {tuple(k.shape)}")
    kv_heads = k.shape[1]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, not a multiple of the {kv_heads} kv heads of k")
    if not 1 <= head_dim <= 256:
        raise ValueError(f"head_dim of q must be 1 to 256, got {head_dim}")
    _check_integer("cu_seqlens", cu_seqlens, (torch.int32,), None, q.device)
    if cu_seqlens.numel() < 1:
        raise ValueError("cu_seqlens must hold batch + 1 offsets, got none")
    batch = cu_seqlens.numel() - 1
    if memory_k is not None and memory_v is not None:
        _check_rank(4, "[batch, kv_heads, slots, head_dim]", memory_k=memory_k, memory_v=memory_v)
        if memory_k.shape != memory_v.shape:
            raise ValueError(
                f"memory_k and memory_v must have one shape, got {tuple(memory_k.shape)} and {tuple(memory_v.shape)}"
            )
        expected = (batch, kv_heads, memory_k.shape[2], head_dim)
        if tuple(memory_k.shape) != expected:
            raise ValueError(
                f"memory_k must be [batch, kv_heads, slots, head_dim] = {expected} to match cu_seqlens and k, "
                f"got {tuple(memory_k.shape)}"
            )
    if max_seqlen is not None:
        if max_seqlen < 0:
            raise ValueError(f"max_seqlen must not be negative, got {max_seqlen}")
        check_visibility(max_seqlen, 0 if memory_k is None else memory_k.shape[2], visibility, window)


def check_offsets(cu_seqlens: Tensor, tokens: int, slots: int, visibility: str, max_seqlen: int | None) -> int:
    """The longest sentence's length, once the values of ``cu_seqlens`` (on the CPU) are found to fit."""
    values = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(values)]
    if values[0] != 0 or values[-1] != tokens:
        raise ValueError(f"cu_seqlens must run from 0 to the {tokens} tokens of q, got {values[0]} to {values[-1]}")
    if min(lengths, default=0) < 0:
        shortest = min(lengths)
        raise ValueError(f"cu_seqlens must not decrease, but sentence {lengths.index(shortest)} has {shortest} tokens")
    longest = max(lengths, default=0)
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but cu_seqlens holds a sentence of {longest} tokens")
    check_visibility(longest, slots, visibility, None)
    return longest


def check_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Everything that can be checked without reading device memory."""
    _check_floating(q=q, k_cache=k_cache, v_cache=v_cache)
    _check_rank(3, "[batch, heads, head_dim]", q=q)
    _check_rank(4, "[batch, kv_heads, positions, head_dim]", k_cache=k_cache, v_cache=v_cache)
    _check_scores(scale, window, softcap)
    batch, heads, head_dim = q.shape
    if k_cache.shape != v_cache.shape:
        raise ValueError(
            f"k_cache and v_cache must have one shape, got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    kv_heads = k_cache.shape[1]
    if k_cache.shape[0] != batch or k_cache.shape[3] != head_dim:
        raise ValueError(
            f"k_cache must be [batch {batch}, kv_heads, positions, head_dim {head_dim}] as q is, "
            f"got {tuple(k_cache.shape)}"
        )
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, not a multiple of the {kv_heads} kv heads of k_cache")
    if not 1 <= head_dim <= 256:
        raise ValueError(f"head_dim of q must be 1 to 256, got {head_dim}")
    _check_integer("lengths", lengths, (torch.int32, torch.int64), batch, q.device)


def check_new_token(k: Tensor, v: Tensor, k_cache: Tensor, positions: Tensor) -> None:
    """What a step writes into a cache, as far as it can be checked without reading device memory."""
    batch, kv_heads, _, head_dim = k_cache.shape
    for name, new in (("k", k), ("v", v)):
        if tuple(new.shape) != (batch, kv_heads, head_dim):
            raise ValueError(f"{name} must be {[batch, kv_heads, head_dim]} for k_cache, got {list(new.shape)}")
        if new.dtype != k_cache.dtype or new.device != k_cache.device:
            raise TypeError(f"{name} is {new.dtype} on {new.device}, k_cache {k_cache.dtype} on {k_cache.device}")
    _check_integer("positions", positions, (torch.int64,), batch, k_cache.device)


def check_sinks(sinks: Tensor, q: Tensor) -> None:
    """ValueError or TypeError unless ``sinks`` has one floating number for every head of q ``[.., H, D]``, beside it."""
    heads = q.shape[-2]
    if tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must be [heads] = [{heads}] to match q, got {list(sinks.shape)}")
    if not sinks.dtype.is_floating_point:
        raise TypeError(f"sinks must be floating, got {sinks.dtype}")
    if sinks.device != q.device:
        raise ValueError(f"sinks is on {sinks.device}, q on {q.device}: they must be on one device")


def check_positions(positions: Tensor, capacity: int) -> None:
    """ValueError if a row of ``positions`` (on the CPU) is not one of the cache's ``capacity`` positions."""
    for row, position in enumerate(positions.tolist()):
        if not 0 <= position < capacity:
            raise ValueError(f"positions must be 0 to {capacity - 1}, got {position} in row {row}")


def check_lengths(lengths: Tensor, positions: int) -> None:
    """ValueError if a row of ``lengths`` (on the CPU) claims more positions than the cache has, or fewer than none."""
    values = lengths.tolist()
    if values and not 0 <= min(values) <= max(values) <= positions:
        raise ValueError(
            f"lengths must be 0 to the {positions} positions of k_cache, got {min(values)} to {max(values)}"
        )
