"""Device functions shared by the Triton kernels: elementary functions of known accuracy and the Philox stream.

tl.exp and tl.log become the GPU's approximate instructions, whose error (2^-22, and growing with |x|) breaks the error
rule in fp32; these are the polynomials of csrc/cpu/simd_math.h, good to about an ulp, so noise agrees between backends to
the last bits. All arithmetic is fp32: cast half types before calling (the interpreter computes bf16 wrongly).
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import backend

_INTERPRETED = tl.constexpr(backend.INTERPRET)


@triton.jit
def divided_program(n):
    """(id // n, id % n) of the program along the first axis, as int64: divided as int32, since 64-bit division is a call."""
    program = tl.program_id(0)
    return (program // n).to(tl.int64), (program % n).to(tl.int64)


@triton.jit
def share_of_program(blocks):
    """The blocks [first, last) of a program among those along the first axis: int32, with no product to overflow."""
    splits, split = tl.num_programs(0), tl.program_id(0)
    each, more = blocks // splits, blocks % splits
    first = split * each + tl.minimum(split, more)
    return first, first + each + (split < more).to(tl.int32)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 to an output's dtype, to the nearest. Triton's interpreter truncates to bf16 whatever rounding is asked for
    (seen in 3.9), so there the rounding is done in integers first; compiled code is a plain conversion."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def exp_(x):
    """e^x for fp32 x: Inf above 88.7, gradual underflow, NaN stays NaN (Cephes' expf, scaled in two halves)."""
    c = tl.where(x > 89.0, 89.0, x)  # comparisons written so that NaN stays NaN
    c = tl.where(c < -104.0, -104.0, c)
    shifted = c * 1.44269504088896341 + 12582912.0  # adding 1.5 * 2^23 rounds to an integer, kept in the low bits
    n = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    nf = shifted - 12582912.0
    r = c - nf * 0.693359375
    r = r - nf * -2.12194440e-4
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = p * (r * r) + r + 1.0
    half = n >> 1
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((n - half + 127) << 23).to(tl.float32, bitcast=True)
    return p * low * high


@triton.jit
def exp_parts(x):
    """e^(x/2), e^x - 1 and e^x - 1 - x of fp32 x for the price of one exponential, without cancellation near 0."""
    c = 0.5 * x
    c = tl.where(c > 89.0, 89.0, c)
    c = tl.where(c < -104.0, -104.0, c)
    shifted = c * 1.44269504088896341 + 12582912.0
    n = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    nf = shifted - 12582912.0
    r = c - nf * 0.693359375
    r = r - nf * -2.12194440e-4
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    tail = p * (r * r)
    q = tail + r
    high = q + 1.0
    low = q - (high - 1.0)  # e^(x/2) = high + low: its square keeps the precision of one exponential
    first = ((n >> 1) + 127) << 23
    second = (n - (n >> 1) + 127) << 23
    s1 = first.to(tl.float32, bitcast=True)
    s2 = second.to(tl.float32, bitcast=True)
    full = (high * high + 2.0 * high * low) * s1 * s2 * s1 * s2
    near = n == 0
    minus1 = tl.where(near, q * q + 2.0 * q, full - 1.0)
    excess = tl.where(near, q * q + 2.0 * tail, full - 1.0 - x)
    return high * s1 * s2, minus1, excess


@triton.jit
def tanh_(x):
    """tanh of fp32 x (Cephes' tanhf): a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel. NaN stays NaN."""
    a = tl.abs(x)
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    near = p * z * x + x
    far = 1.0 - 2.0 / (exp_(a + a) + 1.0)
    return tl.where(a < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def log_unit(x):
    """ln x for normal fp32 x in (0, 1], relative accuracy up to 1 - 2^-24 (Cephes' logf)."""
    bits = x.to(tl.int32, bitcast=True)
    e = ((bits >> 23) - 126).to(tl.float32)
    m = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    low = m < 0.707106781186547524
    e = tl.where(low, e - 1.0, e)
    m = tl.where(low, m + m, m) - 1.0
    z = m * m
    y = 7.0376836292e-2 * m - 1.1514610310e-1
    y = y * m + 1.1676998740e-1
    y = y * m - 1.2420140846e-1
    y = y * m + 1.4249322787e-1
    y = y * m - 1.6668057665e-1
    y = y * m + 2.0000714765e-1
    y = y * m - 2.4999993993e-1
    y = y * m + 3.3333331174e-1
    y = y * m * z
    y = y + e * -2.12194440e-4
    y = y - 0.5 * z
    return (m + y) + e * 0.693359375


@triton.jit
def philox_words(seed, offset, block):
    """The four words (uint32) of each block of the stream (seed, offset): kernels/philox.py. block: int64 tensor."""
    c0 = (block & 0xFFFFFFFF).to(tl.uint32)
    c1 = ((block >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = c0 * 0 + (offset & 0xFFFFFFFF).to(tl.uint32)
    c3 = c0 * 0 + ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    m0 = tl.full((), 0xD2511F53, tl.uint32)
    m1 = tl.full((), 0xCD9E8D57, tl.uint32)
    w0 = tl.full((), 0x9E3779B9, tl.uint32)
    w1 = tl.full((), 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        hi0 = tl.umulhi(c0, m0 + c0 * 0)
        lo0 = c0 * m0
        hi1 = tl.umulhi(c2, m1 + c2 * 0)
        lo1 = c2 * m1
        c0 = hi1 ^ c1 ^ k0
        c2 = hi0 ^ c3 ^ k1
        c1 = lo1
        c3 = lo0
        k0 = k0 + w0
        k1 = k1 + w1
    return c0, c1, c2, c3


@triton.jit
def box_muller(a, b):
    """Two fp32 normals from two words; the nearest quarter turn is taken off in integers, without rounding."""
    u = ((a >> 8) + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    radius = tl.sqrt_rn(-2.0 * log_unit(u))
    turn = (b >> 8).to(tl.int32)
    quarter = (turn + 2097152) >> 22
    t = (turn - (quarter << 22)).to(tl.float32) * 3.7450702e-7
    z = t * t
    s = -1.9515295891e-4 * z + 8.3321608736e-3
    s = s * z - 1.6666654611e-1
    s = s * z * t + t
    c = 2.443315711809948e-5 * z - 1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = c * z * z - 0.5 * z + 1.0
    swap = (quarter & 1) != 0
    cosine = tl.where(swap, s, c)
    sine = tl.where(swap, c, s)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    return radius * cosine, radius * sine


@triton.jit
def _interleave4(x0, x1, x2, x3):
    """[R, Q] four times -> [R, 4 * Q] with element 4 * q + k from xk."""
    both = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return tl.reshape(both, (x0.shape[0], x0.shape[1] * 4))


@triton.jit
def normal_tile(seed, offset, first_block, QUADS: tl.constexpr):
    """Normals of rows whose first Philox block is first_block [R] (int64): fp32 [R, 4 * QUADS]."""
    block = first_block[:, None] + tl.arange(0, QUADS)[None, :]
    x0, x1, x2, x3 = philox_words(seed, offset, block)
    n0, n1 = box_muller(x0, x1)
    n2, n3 = box_muller(x2, x3)
    return _interleave4(n0, n1, n2, n3)


@triton.jit
def keep_tile(seed, offset, first_block, threshold, QUADS: tl.constexpr):
    """Dropout's kept elements of the same rows, as a boolean [R, 4 * QUADS]; threshold: philox.dropout_threshold(p)."""
    block = first_block[:, None] + tl.arange(0, QUADS)[None, :]
    x0, x1, x2, x3 = philox_words(seed, offset, block)
    return (_interleave4(x0, x1, x2, x3) >> 8).to(tl.int32) >= threshold
