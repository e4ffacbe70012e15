"""A kernel that writes the stream out, for test_philox (a module of its own: it is imported only where Triton is)."""

import triton
import triton.language as tl

from lmvae_fast.kernels.triton_math import normal_tile, philox_words


@triton.jit
def stream_kernel(seed, words, normal, ROWS: tl.constexpr, LAST: tl.constexpr, QUADS: tl.constexpr):
    row = tl.arange(0, ROWS).to(tl.int64)
    key, offset = tl.load(seed), tl.load(seed + 1)
    quad = tl.arange(0, QUADS)
    x0, x1, x2, x3 = philox_words(key, offset, row[:, None] * QUADS + quad[None, :])
    at = row[:, None] * (4 * QUADS) + 4 * quad[None, :]
    ok = (row[:, None] < LAST) & (quad[None, :] < QUADS)
    tl.store(words + at, x0.to(tl.int32, bitcast=True), mask=ok)
    tl.store(words + at + 1, x1.to(tl.int32, bitcast=True), mask=ok)
    tl.store(words + at + 2, x2.to(tl.int32, bitcast=True), mask=ok)
    tl.store(words + at + 3, x3.to(tl.int32, bitcast=True), mask=ok)
    col = tl.arange(0, 4 * QUADS)
    eps = normal_tile(key, offset, row * QUADS, QUADS)
    tl.store(normal + row[:, None] * (4 * QUADS) + col[None, :], eps, mask=(row[:, None] < LAST) & (col[None, :] >= 0))
