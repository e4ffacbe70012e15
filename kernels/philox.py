"""The one random stream: Philox4x32-10 (Salmon et al., SC'11) and Box-Muller, the same bits in torch, C++ and Triton.

Definition, for an op that needs noise of shape [..., D], read as rows [R, D] in row-major order:

* A stream is a pair (seed, offset) of 64-bit integers, held in an int64 tensor [2] on the op's device, so that a captured
  CUDA graph draws fresh noise at each replay.
* Every row takes whole Philox blocks of four words: element d of row r is word d % 4 of block r * ceil(D / 4) + d // 4.
  So an element's bits depend on (seed, offset, r, d, D) only, never on threads, tiles or launch configuration.
* Block b has counter (low(b), high(b), low(offset), high(offset)) and key (low(seed), high(seed)), low and high being
  32-bit halves; ten rounds; words are x0..x3.
* Uniform of a word: (x >> 8) / 2^24, in [0, 1), exact in fp32. A dropout keeps a word when (x >> 8) >= round(p * 2^24).
* Normals: words (x0, x1) give elements 0 and 1, (x2, x3) give 2 and 3. With u = ((x0 >> 8) + 1) / 2^24 in (0, 1] and
  v = (x1 >> 8) / 2^24:  sqrt(-2 ln u) * cos(2 pi v) and sqrt(-2 ln u) * sin(2 pi v). The largest possible is 5.77.
  Bits are identical everywhere; normals differ by libm only (a few ulp). fp64 uses the same uniforms at full precision.

The C++ form is csrc/cpu/simd_math.h, the Triton form kernels/triton_math.py.
"""

from __future__ import annotations

import math

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def seed_tensor(seed: int | torch.Tensor | None, device: torch.device | str) -> torch.Tensor:
    """The (seed, offset) pair of a call: int64 [2] on `device`, without host synchronisation.

    None draws both from torch's generator of that device (`torch.manual_seed` governs; under CUDA graph capture each
    replay draws anew). An int is the seed with offset 0. A tensor is checked and passed through.
    """
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.shape != (2,):
            raise ValueError(f"seed must be an int64 tensor of shape [2], got {seed.dtype} {list(seed.shape)}")
        if seed.device.type != torch.device(device).type:
            raise ValueError(f"seed is on {seed.device}, the inputs are on {device}")
        return seed.detach().contiguous()
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise TypeError(f"seed must be None, an int of 64 bits or an int64 tensor [2], got {seed!r}")
    signed = seed - 2**64 if seed >= 2**63 else seed
    # Two fills and no copy from the host: allowed under CUDA graph capture.
    pair = torch.zeros(2, dtype=torch.int64, device=device)
    pair[:1].fill_(signed)
    return pair


def _mul_hi_lo(a: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    # The int64 product wraps, yet its 64 bits are those of the unsigned product.
    product = a * m
    return (product >> 32) & _MASK, product & _MASK


def words(seed: torch.Tensor, rows: int | torch.Tensor, cols: int) -> torch.Tensor:
    """The stream's 32-bit words for [rows, cols], as int64 in [0, 2^32). seed: int64 [2]; rows: how many from row 0 on, or
    which, int64 [R]."""
    blocks = -(-cols // 4)
    which = torch.arange(rows, device=seed.device) if isinstance(rows, int) else rows
    block = (which.unsqueeze(1) * blocks + torch.arange(blocks, device=seed.device)).flatten()
    return block_words(seed[0], seed[1].expand_as(block), block).view(len(which), blocks * 4)[:, :cols]


def block_words(key: torch.Tensor, offset: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """The four words of blocks given one by one: key int64 scalar, offset and block int64 [n] -> int64 [n, 4]."""
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    c0, c1 = block & _MASK, (block >> 32) & _MASK
    c2, c3 = offset & _MASK, (offset >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, _MULTIPLIER[0])
        hi1, lo1 = _mul_hi_lo(c2, _MULTIPLIER[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _rows_cols(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


def uniform(seed: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uniforms in [0, 1) with 24 random bits, of `shape` (last dimension is the row). seed: int64 [2]."""
    return ((words(seed, *_rows_cols(shape)) >> 8).to(torch.float64) * 2.0**-24).to(dtype).view(shape)


def normal(
    seed: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, which: torch.Tensor | None = None
) -> torch.Tensor:
    """Standard normals of `shape`, computed in fp64 and rounded once to `dtype`. seed: int64 [2].

    which: int64 [R], the rows of the stream to take, where they are not the first ones.
    """
    rows, cols = _rows_cols(shape)
    padded = -(-cols // 4) * 4
    pairs = (words(seed, rows if which is None else which, padded) >> 8).to(torch.float64).view(rows, padded // 2, 2)
    radius = torch.sqrt(-2.0 * torch.log((pairs[..., 0] + 1.0) * 2.0**-24))
    angle = pairs[..., 1] * (2.0 * math.pi * 2.0**-24)
    both = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return both.view(rows, padded)[:, :cols].reshape(shape).to(dtype)


def dropout_threshold(p: float) -> int:
    """The integer t such that a word is kept when (word >> 8) >= t; raises ValueError unless 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout={p} is not in [0, 1)")
    return round(p * 2**24)


def keep_mask(seed: torch.Tensor, shape: tuple[int, ...], p: float) -> torch.Tensor:
    """Boolean mask of `shape`: True where a dropout of probability p keeps the element. seed: int64 [2]."""
    return ((words(seed, *_rows_cols(shape)) >> 8) >= dropout_threshold(p)).view(shape)
