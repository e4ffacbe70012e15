"""latent_kv in plain torch: the truth that every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def _philox_words(index: Tensor, seed: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): counter (index, 0, 0), key = seed -> int64 words [n, 4] in [0, 2^32)."""
    c = [index & _MASK32, index >> 32, seed[1] & _MASK32, (seed[1] >> 32) & _MASK32]
    c = [x.expand_as(index) for x in c]
    k0, k1 = seed[0] & _MASK32, (seed[0] >> 32) & _MASK32

    def mul(x: Tensor, m: int) -> tuple[Tensor, Tensor]:  # 32 x 32 -> (high, low) without overflowing int64
        low, high = (x & 0xFFFF) * m, (x >> 16) * m
        high = high + (low >> 16)
        return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)

    for _ in range(10):
        h0, l0 = mul(c[0], 0xD2511F53)
        h1, l1 = mul(c[2], 0xCD9E8D57)
        c = [h1 ^ c[1] ^ k0, l1, h0 ^ c[3] ^ k1, l0]
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack(c, dim=-1)


def keep_mask(shape: tuple[int, ...], p: float, seed: Tensor) -> Tensor:
    """Bool mask of kept elements: a function of (seed, linear element index) only. seed: int64 [2] = (seed, offset)."""
    numel = 1
    for n in shape:
        numel *= n
    words = _philox_words(torch.arange((numel + 3) // 4, device=seed.device), seed).reshape(-1)[:numel]
    return (words >= int(p * 2**32)).view(shape)


def latent_kv(
    z: Tensor, weight: Tensor, bias: Tensor | None, dropout: float, seed: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """z [B, nz], weight [L, 2, Hkv, M, D, nz], bias [L, 2, Hkv, M, D] -> memory [L, 2, B, Hkv, M, D]."""
    layers, two, heads, slots, dim, nz = weight.shape
    memory = (z @ weight.reshape(-1, nz).T).view(z.shape[0], layers, two, heads, slots, dim)
    if bias is not None:
        memory = memory + bias
    memory = memory.permute(1, 2, 0, 3, 4, 5)
    if dropout > 0.0:
        assert seed is not None
        keep = keep_mask(tuple(memory.shape), dropout, seed)
        memory = torch.where(keep, memory * (1.0 / (1.0 - dropout)), torch.zeros_like(memory))
    return memory.to(dtype).contiguous()
