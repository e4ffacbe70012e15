"""ALiBi without a kernel of its own: what a bias by distance adds to a score is a product of a few more numbers a head.

A bias slope * (position of the key) differs from slope * (distance) by what is equal for all keys of a query, which softmax
does not see. So a query gets the slope, a key its position, and attention adds their product to the score. Both are split
into two parts that half precision holds exactly (positions below 32,768), hence four columns. Memory slots stand at positions
too.

Source: ALiBi (arXiv 2108.12409).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmvae_fast.kernels.latent_attention.visibility import slot_position

COLUMNS = 4
_PART = 128  # positions up to 256 parts of this size are exact in bfloat16


def query_columns(slopes: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """What every query of a head ends with, ``[heads, 4]``: slopes ``[heads]`` over the factor that scores get later."""
    whole = slopes.double() / scale
    first = whole.to(dtype).double()
    return torch.stack([first, first, whole - first, whole - first], dim=-1).to(dtype)


def key_columns(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """What keys at these positions (int64 ``[...]``) end with: ``[..., 4]``."""
    rest = positions % _PART
    return torch.stack([positions - rest, rest, positions - rest, rest], dim=-1).to(dtype)


def slot_columns(slots: int, visibility: str, like: Tensor) -> Tensor:
    """What the keys of memory slots end with, ``[slots, 4]``, in dtype and on device of ``like``."""
    slot = torch.arange(slots, device=like.device)
    # Under `rolling` slot 0 is seen at the first step alone, and slot j > 0 at later ones.
    return key_columns(slot_position(slot, visibility, step=slot), like.dtype)


def with_positions(memory: Tensor, visibility: str) -> Tensor:
    """A memory ``[layers, 2, batch, kv_heads, slots, head_dim]`` whose keys end with where their slots stand."""
    keys, values = memory.unbind(1)
    columns = slot_columns(memory.shape[-2], visibility, memory).expand(*keys.shape[:-1], COLUMNS)
    return torch.stack([torch.cat([keys[..., :-COLUMNS], columns], dim=-1), values], dim=1)
