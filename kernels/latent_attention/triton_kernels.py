"""latent_attention on CUDA: one program owns a block of a sentence's queries (forward) or the whole of a short sentence
(backward), per kv head; no atomics, so every gradient is deterministic."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_math import cast, divided_program, exp_, tanh_
from .visibility import INTERLEAVED, PREFIX, ROLLING

_PREFIX = tl.constexpr(PREFIX)
_ROLLING = tl.constexpr(ROLLING)
_INTERLEAVED = tl.constexpr(INTERLEAVED)

# Throughout: rows are (token i, head of the group g) = i * GROUP + g, so a block of rows sees nearly the same keys.
# VISIBILITY: a number of visibility.py. window: cache positions.
# DOT: the dtype that tl.dot multiplies in (fp32 in the interpreter, which computes half types wrongly).


@triton.jit
def _block_index():
    """A program's block among those of its pair: a grid's second axis is short, so there may be a third (triton.py)."""
    return tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    # The approximate instruction's error is below the rounding of half types, but not of fp32.
    if EXACT:
        return exp_(x)
    return tl.exp(x)


@triton.jit
def _sees_slot(i, j, slots, window, VISIBILITY: tl.constexpr, HAS_WINDOW: tl.constexpr):
    if VISIBILITY == _PREFIX:
        seen = (j < slots) & (i >= 0)
        if HAS_WINDOW:
            seen = seen & (j > slots + i - window)
    elif VISIBILITY == _ROLLING:
        later = (i > 0).to(tl.int32)  # slot 0 belongs to token 0 alone, and slot j stands at j - 1 for the others
        seen = (j < slots) & (j <= i) & (j >= later)
        if HAS_WINDOW:
            seen = seen & (j - later > i + 1 - window)
    else:
        seen = (j < slots) & (j <= i)
        if HAS_WINDOW:
            seen = seen & (2 * j > 2 * i + 1 - window)
    return seen


@triton.jit
def _sees_token(i, t, window, VISIBILITY: tl.constexpr, HAS_WINDOW: tl.constexpr):
    seen = t <= i
    if VISIBILITY == _ROLLING:
        seen = seen & (t >= i - 1)
    if HAS_WINDOW:
        if VISIBILITY == _INTERLEAVED:
            seen = seen & (2 * (i - t) < window)
        else:
            seen = seen & (i - t < window)
    return seen


@triton.jit
def _slot_bounds(first, last, slots, window, VISIBILITY: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Slots that tokens first..last see lie in [low, high)."""
    low = 0
    high = slots
    if VISIBILITY != _PREFIX:
        high = tl.minimum(slots, last + 1)
    if HAS_WINDOW:
        if VISIBILITY == _PREFIX:
            low = tl.maximum(0, slots + first - window + 1)
        elif VISIBILITY == _ROLLING:
            low = tl.maximum(0, first + 2 - window)
        else:
            low = tl.maximum(0, 2 * first + 2 - window) // 2
    return low, high


@triton.jit
def _token_bounds(first, last, window, VISIBILITY: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Tokens that tokens first..last see lie in [low, last + 1)."""
    low = 0
    if VISIBILITY == _ROLLING:
        low = tl.maximum(0, first - 1)
    if HAS_WINDOW:
        reach = window - 1
        if VISIBILITY == _INTERLEAVED:
            reach = (window - 1) // 2
        low = tl.maximum(low, first - reach)
    return low, last + 1


@triton.jit
def _tile(base, index, ok, stride_row, d, d_ok, stride_d, DOT: tl.constexpr):
    """Rows `index` of a [rows, head_dim] matrix as [len(index), len(d)]; zero outside."""
    at = base + index.to(tl.int64)[:, None] * stride_row + d.to(tl.int64)[None, :] * stride_d
    x = tl.load(at, mask=ok[:, None] & d_ok[None, :], other=0.0)
    return x.to(tl.float32).to(DOT)


@triton.jit
def _row_tile(base, i, g, ok, stride_t, stride_h, d, d_ok, stride_d, DOT: tl.constexpr):
    """The same for rows (token, head of the group)."""
    rows = i.to(tl.int64) * stride_t + g.to(tl.int64) * stride_h
    x = tl.load(base + rows[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=ok[:, None] & d_ok[None, :], other=0.0)
    return x.to(tl.float32).to(DOT)


@triton.jit
def _store_tile(base, index, ok, stride_row, d, d_ok, x):
    at = base + index.to(tl.int64)[:, None] * stride_row + d[None, :]
    tl.store(at, cast(x, base.dtype.element_ty), mask=ok[:, None] & d_ok[None, :])


@triton.jit
def _times_transposed(a, b):
    """a [M, D] times b [N, D] transposed. fp32 of 256 columns in four parts: without tensor cores a thread holds whole rows
    of both operands in registers, and Triton 3.6 spills them."""
    width: tl.constexpr = a.shape[1]
    # Two branches, not a return before the rest: what follows one is compiled all the same.
    if width >= 256 and a.dtype == tl.float32:
        rows = tl.permute(tl.reshape(a, (a.shape[0], 4, width // 4)), (1, 0, 2))
        columns = tl.permute(tl.reshape(b, (b.shape[0], 4, width // 4)), (1, 2, 0))
        product = tl.sum(tl.dot(rows, columns, input_precision="ieee"), 0)
    else:
        product = tl.dot(a, tl.trans(b), input_precision="ieee")
    return product


@triton.jit
def _scores(q, k, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores [rows, keys], and d(score) / d(scaled product)."""
    s = _times_transposed(q, k) * scale
    slope = s
    if HAS_SOFTCAP:
        t = tanh_(s / softcap)
        s = t * softcap
        slope = 1.0 - t * t
    return s, slope


@triton.jit
def _attend(q, k, v, seen, largest, total, acc, scale, softcap, HAS_SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """One block of keys into the running softmax."""
    s, _ = _scores(q, k, scale, softcap, HAS_SOFTCAP)
    s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(largest, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: no Inf - Inf
    p = _exp(s - base[:, None], EXACT)
    rescale = _exp(largest - base, EXACT)
    total = total * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return new, total, acc


@triton.jit
def latent_attention_fwd_kernel(
    q, k, v, memory_k, memory_v, cu_seqlens, out, stats, heads, kv_heads, slots, head_dim, scale, window, softcap,
    stride_q_t, stride_q_h, stride_q_d, stride_k_t, stride_k_h, stride_k_d, stride_v_t, stride_v_h, stride_v_d,
    stride_mk_b, stride_mk_h, stride_mk_m, stride_mk_d, stride_mv_b, stride_mv_h, stride_mv_m, stride_mv_d,
    VISIBILITY: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, GROUP: tl.constexpr,
    EXACT: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h = divided_program(kv_heads)
    begin = tl.load(cu_seqlens + b).to(tl.int64)
    length = (tl.load(cu_seqlens + b + 1).to(tl.int64) - begin).to(tl.int32)
    row0 = (_block_index() * BLOCK_M).to(tl.int32)
    if row0 < length * GROUP:
        row = row0 + tl.arange(0, BLOCK_M)
        row_ok = row < length * GROUP
        i = row // GROUP
        g = row % GROUP
        d = tl.arange(0, BLOCK_D)
        d_ok = d < head_dim
        n = tl.arange(0, BLOCK_N)
        first = row0 // GROUP
        last = tl.minimum(row0 + BLOCK_M - 1, length * GROUP - 1) // GROUP

        q_base = q + begin * stride_q_t + h * GROUP * stride_q_h
        q_tile = _row_tile(q_base, i, g, row_ok, stride_q_t, stride_q_h, d, d_ok, stride_q_d, DOT)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

        low, high = _slot_bounds(first, last, slots, window, VISIBILITY, HAS_WINDOW)
        k_base = memory_k + b * stride_mk_b + h * stride_mk_h
        v_base = memory_v + b * stride_mv_b + h * stride_mv_h
        for start in range(low, high, BLOCK_N):
            j = start + n
            k_tile = _tile(k_base, j, j < high, stride_mk_m, d, d_ok, stride_mk_d, DOT)
            v_tile = _tile(v_base, j, j < high, stride_mv_m, d, d_ok, stride_mv_d, DOT)
            seen = _sees_slot(i[:, None], j[None, :], slots, window, VISIBILITY, HAS_WINDOW)
            largest, total, acc = _attend(
                q_tile, k_tile, v_tile, seen, largest, total, acc, scale, softcap, HAS_SOFTCAP, EXACT
            )
        low, high = _token_bounds(first, last, window, VISIBILITY, HAS_WINDOW)
        k_base = k + begin * stride_k_t + h * stride_k_h
        v_base = v + begin * stride_v_t + h * stride_v_h
        for start in range(low, high, BLOCK_N):
            t = start + n
            k_tile = _tile(k_base, t, t < high, stride_k_t, d, d_ok, stride_k_d, DOT)
            v_tile = _tile(v_base, t, t < high, stride_v_t, d, d_ok, stride_v_d, DOT)
            seen = _sees_token(i[:, None], t[None, :], window, VISIBILITY, HAS_WINDOW) & (t < high)[None, :]
            largest, total, acc = _attend(
                q_tile, k_tile, v_tile, seen, largest, total, acc, scale, softcap, HAS_SOFTCAP, EXACT
            )
        factor = 1.0 / total
        place = (begin + i) * heads + h * GROUP + g
        _store_tile(out, place, row_ok, head_dim, d, d_ok, acc * factor[:, None])
        tl.store(stats + place * 2, tl.where(largest == float("-inf"), 0.0, largest), mask=row_ok)
        tl.store(stats + place * 2 + 1, factor, mask=row_ok)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _grad_scores(
    q, k, v, grad, seen, largest, factor, delta, scale, softcap, HAS_SOFTCAP: tl.constexpr, EXACT: tl.constexpr
):
    """Probabilities, and the gradient of the unscaled products, of one block of keys."""
    s, slope = _scores(q, k, scale, softcap, HAS_SOFTCAP)
    s = tl.where(seen, s, float("-inf"))
    p = _exp(s - largest[:, None], EXACT) * factor[:, None]
    ds = p * (_times_transposed(grad, v) - delta[:, None]) * scale
    if HAS_SOFTCAP:
        ds = ds * slope
    # Where p is 1 nothing else counts and the gradient is 0; dP and delta, summed in two ways, would leave their rounding.
    return p, tl.where(seen & (p != 1.0), ds, 0.0)


@triton.jit
def latent_attention_bwd_kernel(
    grad_out, q, k, v, memory_k, memory_v, cu_seqlens, out, stats, grad_q, grad_k, grad_v, grad_memory_k, grad_memory_v,
    heads, kv_heads, slots, head_dim, scale, window, softcap,
    stride_g_t, stride_g_h, stride_g_d,
    stride_q_t, stride_q_h, stride_q_d, stride_k_t, stride_k_h, stride_k_d, stride_v_t, stride_v_h, stride_v_d,
    stride_mk_b, stride_mk_h, stride_mk_m, stride_mk_d, stride_mv_b, stride_mv_h, stride_mv_m, stride_mv_d,
    VISIBILITY: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, GROUP: tl.constexpr,
    EXACT: tl.constexpr, DOT: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Three uses of one kernel. QUERIES and KEYS: the sentence's rows fit in one block; a program takes all keys, block by
    # block, and makes every gradient. QUERIES alone: grad_q of one block of rows, over the keys it sees. KEYS alone: the
    # gradients of one block of keys (slots first, then tokens), over the rows that see it.
    b, h = divided_program(kv_heads)
    pair = tl.program_id(0).to(tl.int64)
    block = _block_index().to(tl.int32)
    begin = tl.load(cu_seqlens + b).to(tl.int64)
    length = (tl.load(cu_seqlens + b + 1).to(tl.int64) - begin).to(tl.int32)
    rows = length * GROUP
    d = tl.arange(0, BLOCK_D)
    d_ok = d < head_dim
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    q_base = q + begin * stride_q_t + h * GROUP * stride_q_h
    g_base = grad_out + begin * stride_g_t + h * GROUP * stride_g_h
    place0 = begin * heads + h * GROUP
    slot_blocks = (slots + BLOCK_N - 1) // BLOCK_N
    token_blocks = (length + BLOCK_N - 1) // BLOCK_N

    if QUERIES:
        key_start, key_stop = 0, slot_blocks + token_blocks
    else:
        key_start, key_stop = block, tl.minimum(block + 1, slot_blocks + token_blocks)
    if QUERIES and not KEYS:
        active = block * BLOCK_M < rows
    else:
        active = True  # an empty sentence still has slots, whose gradient is zero
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if QUERIES:
        row = block * BLOCK_M + m
        first = block * BLOCK_M // GROUP
        last = tl.minimum(block * BLOCK_M + BLOCK_M - 1, rows - 1) // GROUP
        row_ok = row < rows
        i = row // GROUP
        g = row % GROUP
        place = place0 + i.to(tl.int64) * heads + g
        q_tile = _row_tile(q_base, i, g, row_ok, stride_q_t, stride_q_h, d, d_ok, stride_q_d, DOT)
        g_tile = _row_tile(g_base, i, g, row_ok, stride_g_t, stride_g_h, d, d_ok, stride_g_d, DOT)
        o_tile = _tile(out, place, row_ok, head_dim, d, d_ok, 1, tl.float32)
        delta = tl.sum(o_tile * g_tile.to(tl.float32), 1)
        largest = tl.load(stats + place * 2, mask=row_ok, other=0.0)
        factor = tl.load(stats + place * 2 + 1, mask=row_ok, other=0.0)
    if active:
        for key_block in range(key_start, key_stop):
            is_slot = key_block < slot_blocks
            c0 = tl.where(is_slot, key_block, key_block - slot_blocks) * BLOCK_N
            count = tl.where(is_slot, slots, length)
            c = c0 + n
            c_ok = c < count
            # One body for slots and tokens: where they stand is chosen, not branched on.
            k_base = tl.where(
                is_slot, memory_k + b * stride_mk_b + h * stride_mk_h, k + begin * stride_k_t + h * stride_k_h
            )
            v_base = tl.where(
                is_slot, memory_v + b * stride_mv_b + h * stride_mv_h, v + begin * stride_v_t + h * stride_v_h
            )
            k_row = tl.where(is_slot, stride_mk_m, stride_k_t)
            v_row = tl.where(is_slot, stride_mv_m, stride_v_t)
            k_dim = tl.where(is_slot, stride_mk_d, stride_k_d)
            v_dim = tl.where(is_slot, stride_mv_d, stride_v_d)
            low, high = 0, rows
            if not QUERIES:  # rows that see none of the block are left out
                if VISIBILITY != _PREFIX:
                    low = c0 * GROUP
                    high = tl.where(is_slot, rows, tl.minimum(rows, (c0 + BLOCK_N + 1) * GROUP))
                    if VISIBILITY == _INTERLEAVED:
                        high = rows
                else:
                    low = tl.where(is_slot, 0, c0 * GROUP)
            dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            needed = True
            if QUERIES:
                slot_low, slot_high = _slot_bounds(first, last, slots, window, VISIBILITY, HAS_WINDOW)
                token_low, token_high = _token_bounds(first, last, window, VISIBILITY, HAS_WINDOW)
                needed = (c0 < tl.where(is_slot, slot_high, token_high)) & (
                    c0 + BLOCK_N > tl.where(is_slot, slot_low, token_low)
                )
            if needed:
                k_tile = _tile(k_base, c, c_ok, k_row, d, d_ok, k_dim, DOT)
                v_tile = _tile(v_base, c, c_ok, v_row, d, d_ok, v_dim, DOT)
                if QUERIES:
                    seen = tl.where(
                        is_slot,
                        _sees_slot(i[:, None], c[None, :], slots, window, VISIBILITY, HAS_WINDOW),
                        _sees_token(i[:, None], c[None, :], window, VISIBILITY, HAS_WINDOW),
                    )
                    seen = seen & c_ok[None, :] & row_ok[:, None]
                    p, ds = _grad_scores(
                        q_tile, k_tile, v_tile, g_tile, seen, largest, factor, delta, scale, softcap, HAS_SOFTCAP, EXACT
                    )
                    dq = tl.dot(ds.to(DOT), k_tile, dq, input_precision="ieee")
                    if KEYS:
                        dv = tl.dot(tl.trans(p.to(DOT)), g_tile, dv, input_precision="ieee")
                        dk = tl.dot(tl.trans(ds.to(DOT)), q_tile, dk, input_precision="ieee")
                else:
                    for start in range(low, high, BLOCK_M):
                        row = start + m
                        row_ok = row < rows
                        i = row // GROUP
                        g = row % GROUP
                        place = place0 + i.to(tl.int64) * heads + g
                        q_tile = _row_tile(q_base, i, g, row_ok, stride_q_t, stride_q_h, d, d_ok, stride_q_d, DOT)
                        g_tile = _row_tile(g_base, i, g, row_ok, stride_g_t, stride_g_h, d, d_ok, stride_g_d, DOT)
                        o_tile = _tile(out, place, row_ok, head_dim, d, d_ok, 1, tl.float32)
                        delta = tl.sum(o_tile * g_tile.to(tl.float32), 1)
                        largest = tl.load(stats + place * 2, mask=row_ok, other=0.0)
                        factor = tl.load(stats + place * 2 + 1, mask=row_ok, other=0.0)
                        seen = tl.where(
                            is_slot,
                            _sees_slot(i[:, None], c[None, :], slots, window, VISIBILITY, HAS_WINDOW),
                            _sees_token(i[:, None], c[None, :], window, VISIBILITY, HAS_WINDOW),
                        )
                        seen = seen & c_ok[None, :] & row_ok[:, None]
                        p, ds = _grad_scores(
                            q_tile, k_tile, v_tile, g_tile, seen, largest, factor, delta, scale, softcap, HAS_SOFTCAP,
                            EXACT,
                        )  # fmt: skip
                        dv = tl.dot(tl.trans(p.to(DOT)), g_tile, dv, input_precision="ieee")
                        dk = tl.dot(tl.trans(ds.to(DOT)), q_tile, dk, input_precision="ieee")
            if KEYS:
                slot_at = pair * slots * head_dim
                token_at = (begin * kv_heads + h) * head_dim
                dk_base = tl.where(is_slot, grad_memory_k + slot_at, grad_k + token_at)
                dv_base = tl.where(is_slot, grad_memory_v + slot_at, grad_v + token_at)
                out_row = tl.where(is_slot, head_dim, kv_heads * head_dim)
                _store_tile(dk_base, c, c_ok, out_row, d, d_ok, dk)
                _store_tile(dv_base, c, c_ok, out_row, d, d_ok, dv)
        if QUERIES:
            _store_tile(grad_q, place, row_ok, head_dim, d, d_ok, dq)
