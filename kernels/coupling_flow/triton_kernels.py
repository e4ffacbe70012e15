"""Device code of coupling_flow: one interpreter of instructions (program.py) over a program's rows, and the sums over rows."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_math import exp_, tanh_
from . import codes

_GELU = tl.constexpr(int(codes.Activation.GELU))
_RELU = tl.constexpr(int(codes.Activation.RELU))
_ATAN = tl.constexpr(int(codes.Squash.ATAN))
_SIGMOID = tl.constexpr(int(codes.Squash.SIGMOID))
_NONE = tl.constexpr(int(codes.Squash.NONE))

_DENSE = tl.constexpr(codes.DENSE)
_ACTIVATE = tl.constexpr(codes.ACTIVATE)
_ACTIVATE_GRAD = tl.constexpr(codes.ACTIVATE_GRAD)
_COUPLE = tl.constexpr(codes.COUPLE)
_MAP = tl.constexpr(codes.MAP)
_AFFINE_GRAD = tl.constexpr(codes.AFFINE_GRAD)
_COUPLE_GRAD = tl.constexpr(codes.COUPLE_GRAD)

_MATRIX_A = tl.constexpr(codes.MATRIX_A)
_MATRIX_C = tl.constexpr(codes.MATRIX_C)
_WIDTH = tl.constexpr(codes.WIDTH)
_OWN = tl.constexpr(codes.OWN)
_TEMPORARY = tl.constexpr(codes.TEMPORARY)

_BIAS = tl.constexpr(codes.BIAS)
_ACCUMULATE = tl.constexpr(codes.ACCUMULATE)
_RECTIFY = tl.constexpr(codes.RECTIFY)
_TRANSPOSED = tl.constexpr(codes.TRANSPOSED)
_CONSTANTS = tl.constexpr(codes.CONSTANTS)
_DENSE_FLAGS = tl.constexpr(codes.DENSE_FLAGS)
_INVERSE = tl.constexpr(codes.INVERSE)
_LOGDET = tl.constexpr(codes.LOGDET)
_SQUASHES = tl.constexpr(codes.SQUASHES)
_COPY = tl.constexpr(codes.COPY)
_RESCALE = tl.constexpr(codes.RESCALE)
_UNSCALE = tl.constexpr(codes.UNSCALE)

_SUM_A = tl.constexpr(codes.SUM_A)
_SUM_G = tl.constexpr(codes.SUM_G)
_SUM_TILE = tl.constexpr(codes.SUM_TILE)

# ---- elementary functions --------------------------------------------------------------------------------------------


@triton.jit
def _atan(x):
    """Cephes' atanf."""
    a = tl.abs(x)
    big, middle = a > 2.414213562373095, a > 0.4142135623730950
    r = tl.where(big, -1.0 / tl.where(big, a, 1.0), tl.where(middle, (a - 1.0) / (a + 1.0), a))
    base = tl.where(big, 1.5707963267948966, tl.where(middle, 0.7853981633974483, 0.0))
    z = r * r
    p = 8.05374449538e-2 * z - 1.38776856032e-1
    p = p * z + 1.99777106478e-1
    p = p * z - 3.33329491539e-1
    y = base + (p * z * r + r)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def _squash(kind, raw):
    t = tanh_(tl.where(kind == _SIGMOID, 0.5 * raw, raw))
    return tl.where(kind == _NONE, raw, tl.where(kind == _ATAN, 0.636 * _atan(raw), t))


@triton.jit
def _squash_slope(kind, raw):
    t = tanh_(tl.where(kind == _SIGMOID, 0.5 * raw, raw))
    slope = (1.0 - t * t) * tl.where(kind == _SIGMOID, 0.5, 1.0)
    return tl.where(kind == _NONE, 1.0, tl.where(kind == _ATAN, 0.636 / (1.0 + raw * raw), slope))


@triton.jit
def _activate(kind, x):
    gelu = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return tl.where(kind == _GELU, gelu, x / (1.0 + exp_(-x)))


@triton.jit
def _activation_slope(kind, x):
    gelu = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * exp_(-0.5 * x * x) * 0.3989422804014327
    sigmoid = 1.0 / (1.0 + exp_(-x))
    silu = sigmoid * (1.0 + x * (1.0 - sigmoid))
    return tl.where(kind == _RELU, tl.where(x <= 0.0, 0.0, 1.0), tl.where(kind == _GELU, gelu, silu))


# ---- instructions ----------------------------------------------------------------------------------------------------


@triton.jit
def _rows_of(temporary, kept, words, batch, rows):
    """Pointers [ROWS, 1] to the first column of a matrix's rows; words: memory, start, columns of a row, column."""
    start, width, column = tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    offsets = start * batch + rows * width + column
    if tl.load(words) == _TEMPORARY:
        at = temporary + offsets[:, None]
    else:
        at = kept + offsets[:, None]
    return at


@triton.jit
def _dense(
    a, c, word, theta, constants, row_ok,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    width, inner, weight = tl.load(word + _WIDTH), tl.load(word + _OWN), tl.load(word + _OWN + 1)
    bias, packed = tl.load(word + _OWN + 2), tl.load(word + _OWN + 3)
    flags, ld = packed % _DENSE_FLAGS, packed // _DENSE_FLAGS
    step_k = tl.where((flags & _TRANSPOSED) != 0, 1, ld)
    step_n = tl.where((flags & _TRANSPOSED) != 0, ld, 1)
    for n0 in range(0, width, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
        n_ok = n < width
        acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for k0 in range(0, inner, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
            k_ok = k < inner
            x = tl.load(a + k[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            at = weight + k[:, None] * step_k + n[None, :] * step_n
            w_ok = k_ok[:, None] & n_ok[None, :]
            if (flags & _CONSTANTS) == 0:
                w = tl.load(theta + at, mask=w_ok, other=0.0)
            else:
                w = tl.load(constants + at, mask=w_ok, other=0.0)
            acc = tl.dot(x.to(DOT), w.to(DOT), acc, input_precision="ieee")
        ok = row_ok[:, None] & n_ok[None, :]
        if (flags & _BIAS) != 0:
            acc += tl.load(theta + bias + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        if (flags & _ACCUMULATE) != 0:
            acc += tl.load(c + n[None, :], mask=ok, other=0.0)
        if (flags & _RECTIFY) != 0:
            acc = tl.where(acc < 0.0, 0.0, acc)
        tl.store(c + n[None, :], acc, mask=ok)


@triton.jit
def _couple(a, c, raw_s, word, clamp, gain, logdet, rows, row_ok, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    width, flags = tl.load(word + _WIDTH), tl.load(word + _OWN + 3)
    kind, inverse = flags % _SQUASHES, (flags & _INVERSE) != 0
    total = tl.zeros((ROWS,), tl.float32)
    for n0 in range(0, width, BLOCK):
        n = n0 + tl.arange(0, BLOCK).to(tl.int64)
        ok = row_ok[:, None] & (n < width)[None, :]
        x = tl.load(a + n[None, :], mask=ok, other=0.0)
        log_scale = clamp * _squash(kind, gain * tl.load(raw_s + n[None, :], mask=ok, other=0.0))
        shift = gain * tl.load(raw_s + width + n[None, :], mask=ok, other=0.0)
        log_scale = tl.where(inverse, -log_scale, log_scale)
        e = exp_(log_scale)
        y = tl.where(inverse, (x - shift) * e, x * e + shift)
        tl.store(c + n[None, :], y, mask=ok)
        total += tl.sum(tl.where(ok, log_scale, 0.0), axis=1)
    if (flags & _LOGDET) != 0:
        tl.store(logdet + rows, tl.load(logdet + rows, mask=row_ok, other=0.0) + total, mask=row_ok)


@triton.jit
def _map(a, c, word, theta, scales, indices, row_ok, BLOCK: tl.constexpr):
    width, index, mode = tl.load(word + _WIDTH), tl.load(word + _OWN), tl.load(word + _OWN + 1)
    prepared, offset = tl.load(word + _OWN + 2), tl.load(word + _OWN + 3)
    for n0 in range(0, width, BLOCK):
        n = n0 + tl.arange(0, BLOCK).to(tl.int64)
        n_ok = n < width
        source = n
        if index >= 0:
            source = tl.load(indices + index + n, mask=n_ok, other=0).to(tl.int64)
        ok = row_ok[:, None] & n_ok[None, :]
        y = tl.load(a + source[None, :], mask=ok, other=0.0)
        if mode != _COPY:
            channel = tl.where(mode == _UNSCALE, n, source)
            scale = tl.load(scales + prepared + channel, mask=n_ok, other=1.0)[None, :]
            add = tl.load(theta + offset + channel, mask=n_ok, other=0.0).to(tl.float32)[None, :]
            y = tl.where(mode == _RESCALE, y * scale + add, (y - add) / scale)
        tl.store(c + n[None, :], y, mask=ok)


@triton.jit
def _affine_grad(g, through, u, word, scales, row_ok, BLOCK: tl.constexpr):
    width, prepared, inverse = tl.load(word + _WIDTH), tl.load(word + _OWN + 1), tl.load(word + _OWN + 2) != 0
    for n0 in range(0, width, BLOCK):
        n = n0 + tl.arange(0, BLOCK).to(tl.int64)
        ok = row_ok[:, None] & (n < width)[None, :]
        grad = tl.load(g + n[None, :], mask=ok, other=0.0)
        scale = tl.load(scales + prepared + n, mask=n < width, other=1.0)[None, :]
        out = tl.where(inverse, grad / scale, grad * scale)
        t = tl.where(inverse, -out, grad)
        tl.store(through + n[None, :], t, mask=ok)
        tl.store(u + n[None, :], t * tl.load(u + n[None, :], mask=ok, other=0.0), mask=ok)
        tl.store(g + n[None, :], out, mask=ok)


@triton.jit
def _couple_grad(a, g, raw_s, d_raw, word, clamp, gain, d_logdet, rows, row_ok, BLOCK: tl.constexpr):
    width, flags = tl.load(word + _WIDTH), tl.load(word + _OWN + 4)
    kind, inverse = flags % _SQUASHES, (flags & _INVERSE) != 0
    dl = tl.load(d_logdet + rows, mask=row_ok, other=0.0)[:, None]
    for n0 in range(0, width, BLOCK):
        n = n0 + tl.arange(0, BLOCK).to(tl.int64)
        ok = row_ok[:, None] & (n < width)[None, :]
        x = tl.load(a + n[None, :], mask=ok, other=0.0)
        grad = tl.load(g + n[None, :], mask=ok, other=0.0)
        raw = gain * tl.load(raw_s + n[None, :], mask=ok, other=0.0)
        log_scale = clamp * _squash(kind, raw)
        dx = grad * exp_(tl.where(inverse, -log_scale, log_scale))
        dt = tl.where(inverse, -dx, grad)
        ds = tl.where(inverse, -(grad * x + dl), dx * x + dl)
        tl.store(g + n[None, :], dx, mask=ok)
        tl.store(d_raw + n[None, :], ds * clamp * gain * _squash_slope(kind, raw), mask=ok)
        tl.store(d_raw + width + n[None, :], dt * gain, mask=ok)


@triton.jit
def _activation(a, c, word, row_ok, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    width, kind = tl.load(word + _WIDTH), tl.load(word + _OWN)
    for n0 in range(0, width, BLOCK):
        n = n0 + tl.arange(0, BLOCK).to(tl.int64)
        ok = row_ok[:, None] & (n < width)[None, :]
        x = tl.load(a + n[None, :], mask=ok, other=0.0)
        if GRAD:
            y = tl.load(c + n[None, :], mask=ok, other=0.0) * _activation_slope(kind, x)
        else:
            y = _activate(kind, x)
        tl.store(c + n[None, :], y, mask=ok)


@triton.jit
def coupling_flow_rows_kernel(
    code, reals, count, temporary, kept, theta, constants, indices, scales, logdet, batch,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < batch
    size = tl.full((), 0, tl.int64) + batch
    for pc in range(count):
        word = code + pc * FIELDS
        op = tl.load(word)
        clamp, gain = tl.load(reals + 2 * pc), tl.load(reals + 2 * pc + 1)
        a = _rows_of(temporary, kept, word + _MATRIX_A, size, rows)
        c = _rows_of(temporary, kept, word + _MATRIX_C, size, rows)
        if op == _DENSE:
            _dense(a, c, word, theta, constants, row_ok, ROWS, BLOCK_N, BLOCK_K, DOT)
        elif op == _ACTIVATE:
            _activation(a, c, word, row_ok, False, BLOCK)
        elif op == _ACTIVATE_GRAD:
            _activation(a, c, word, row_ok, True, BLOCK)
        elif op == _COUPLE:
            raw = _raw_rows(temporary, kept, word + _OWN, size, rows)
            _couple(a, c, raw, word, clamp, gain, logdet, rows, row_ok, ROWS, BLOCK)
        elif op == _MAP:
            _map(a, c, word, theta, scales, indices, row_ok, BLOCK)
        elif op == _AFFINE_GRAD:
            u = temporary + (tl.load(word + _OWN) * size + rows * tl.load(word + _WIDTH))[:, None]
            _affine_grad(a, c, u, word, scales, row_ok, BLOCK)
        elif op == _COUPLE_GRAD:
            raw = _raw_rows(temporary, kept, word + _OWN, size, rows)
            d_raw = temporary + (tl.load(word + _OWN + 3) * size + rows * tl.load(word + _OWN + 2))[:, None]
            _couple_grad(a, c, raw, d_raw, word, clamp, gain, logdet, rows, row_ok, BLOCK)
        tl.debug_barrier()  # what this instruction wrote, the next one reads through other threads


@triton.jit
def _raw_rows(temporary, kept, words, batch, rows):
    """As _rows_of, for a matrix without a column word: memory, start, columns of a row."""
    offsets = tl.load(words + 1) * batch + rows * tl.load(words + 2)
    if tl.load(words) == _TEMPORARY:
        at = temporary + offsets[:, None]
    else:
        at = kept + offsets[:, None]
    return at


@triton.jit
def coupling_flow_sums_kernel(
    jobs, temporary, kept, grad_theta, batch,
    TILE: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    word = jobs + tl.program_id(0).to(tl.int64) * FIELDS
    tile = word + _SUM_TILE
    m0, n0, width_m, width_n = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    out, bias = tl.load(tile + 4), tl.load(tile + 5)
    m, n = m0 + tl.arange(0, TILE), n0 + tl.arange(0, TILE)
    m_ok, n_ok = m < width_m, n < width_n
    size = tl.full((), 0, tl.int64) + batch
    acc = tl.zeros((TILE, TILE), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for first in range(0, batch, CHUNK):
        rows = first + tl.arange(0, CHUNK).to(tl.int64)
        row_ok = rows < batch
        a = _rows_of(temporary, kept, word + _SUM_A, size, rows)
        g = _rows_of(temporary, kept, word + _SUM_G, size, rows)
        x = tl.load(a + m[None, :], mask=row_ok[:, None] & m_ok[None, :], other=0.0)
        d = tl.load(g + n[None, :], mask=row_ok[:, None] & n_ok[None, :], other=0.0)
        acc = tl.dot(tl.trans(x).to(DOT), d.to(DOT), acc, input_precision="ieee")
        total += tl.sum(d, axis=0)
    tl.store(grad_theta + out + m[:, None] * width_n + n[None, :], acc, mask=m_ok[:, None] & n_ok[None, :])
    if bias >= 0:
        tl.store(grad_theta + bias + n, total, mask=n_ok)
