"""aggregate_logpdf on CUDA: a program owns rows of z (values, dz) or posteriors (dmu, dlogvar) and runs over the other side.

Nothing is shared between programs, so every gradient is deterministic. Rows find their group by bisecting the offsets; a
block that straddles groups runs over all of theirs and masks. PER_DIM: densities are [rows, BLOCK_D]; else they are summed
over the row, which BLOCK_D then holds whole: [rows, 1].
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_math import cast, divided_program, exp_, log_unit

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of finite numbers: -Inf - -Inf would be NaN
_CHAIN = tl.constexpr(32)  # terms of a running sum before it is added to its total
_HALF_LOG_2PI = tl.constexpr(0.91893853320467274)


@triton.jit
def _log(x):
    """ln x of fp32 x that is 0, normal, Inf or NaN."""
    return tl.where(x == 0.0, float("-inf"), tl.where(x < float("inf"), log_unit(x), x))


@triton.jit
def _members(index, ok, cu_own, cu_other, groups, steps, count, HAS_GROUPS: tl.constexpr):
    """[begin, end) of the other side's rows in the group of row `index` (int64 [R]); nothing where not ok."""
    begin = tl.where(ok, 0, count).to(tl.int64)
    end = tl.where(ok, count, 0).to(tl.int64)
    if HAS_GROUPS:
        low = (index * 0).to(tl.int32)
        high = low + groups
        for _ in range(steps):
            open_ = low < high
            middle = (low + high) // 2
            beyond = tl.load(cu_own + middle + 1, mask=open_ & ok, other=0) <= index
            low = tl.where(open_ & beyond, middle + 1, low)
            high = tl.where(open_ & (beyond == 0), middle, high)
        found = ok & (low < groups)
        begin = tl.maximum(tl.load(cu_other + low, mask=found, other=count).to(tl.int64), 0)
        end = tl.minimum(tl.load(cu_other + low + 1, mask=found, other=0).to(tl.int64), count)
    return begin, end


@triton.jit
def _row(at, stride, col, ok):
    """One row [BLOCK_D] in fp32, zero where not ok."""
    return tl.load(at + col.to(tl.int64) * stride, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def aggregate_prepare_kernel(
    logvar, root, ratio, posteriors, dim, min_var, stride_lv_n, stride_lv_d,
    HAS_RATIO: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """1 / sqrt(2 e^logvar + min_var), and 2 e^logvar times its square: [N, D] fp32. In fp64, so that a density gets no error
    from them but one rounding; e^logvar over- and underflows as in fp32."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = (n < posteriors)[:, None] & (col < dim)[None, :]
    lv = tl.load(logvar + n[:, None] * stride_lv_n + col[None, :] * stride_lv_d, mask=ok, other=0.0).to(tl.float32)
    twice = 2.0 * tl.exp(lv.to(tl.float64)).to(tl.float32).to(tl.float64)
    inverse = 1.0 / (twice + min_var)
    out = n[:, None] * dim + col[None, :]
    tl.store(root + out, tl.sqrt(inverse).to(tl.float32), mask=ok)
    if HAS_RATIO:
        tl.store(ratio + out, (twice * inverse).to(tl.float32), mask=ok)


@triton.jit
def _density(u, lv, PER_DIM: tl.constexpr):
    """Log-density without its constant. Padding of a joint row has u = lv = 0. Fused in so many words: backward takes
    e^(density - lse) of densities that it makes again, and other roundings there would show in the weights."""
    terms = tl.fma(-u, u, tl.zeros_like(u) - 0.5 * lv)
    if PER_DIM:
        out = terms
    else:
        out = tl.sum(terms, axis=1, keep_dims=True)
    return out


@triton.jit
def _include(largest, total, x, weight):
    """largest + ln(total) with weight e^x more, for one exponential. NaN gets into total."""
    delta = tl.where(x == largest, 0.0, x - largest)  # Inf - Inf is 0 here
    rescale = exp_(-tl.abs(delta))
    up = delta > 0.0
    total = tl.where(up, total * rescale + weight, total + weight * rescale)
    return tl.where(up, x, largest), total


@triton.jit
def aggregate_fwd_kernel(
    z, mu, logvar, root, cu_z, cu_posteriors, logq, lse, rows, posteriors, dim, groups, steps, blocks,
    stride_z_s, stride_z_k, stride_z_d, stride_mu_n, stride_mu_d, stride_lv_n, stride_lv_d,
    HAS_GROUPS: tl.constexpr, PER_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample, row_block = divided_program(blocks)
    row = row_block * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    col = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    col_ok = col < dim
    at = z + sample * stride_z_s + row[:, None] * stride_z_k + col[None, :] * stride_z_d
    point = tl.load(at, mask=row_ok[:, None] & col_ok[None, :], other=0.0).to(tl.float32)
    begin, end = _members(row, row_ok, cu_z, cu_posteriors, groups, steps, posteriors, HAS_GROUPS)
    first, last = tl.min(begin, 0), tl.max(end, 0)
    mean_at, lv_at, root_at = mu + first * stride_mu_n, logvar + first * stride_lv_n, root + first * dim

    width: tl.constexpr = BLOCK_D if PER_DIM else 1
    largest = tl.full((ROWS, width), _LOWEST, tl.float32)
    total = tl.zeros((ROWS, width), tl.float32)
    for start in range(first, last, _CHAIN):
        peak = tl.full((ROWS, width), _LOWEST, tl.float32)
        part = tl.zeros((ROWS, width), tl.float32)
        for n in range(start, tl.minimum(start + _CHAIN, last)):
            lv = _row(lv_at, stride_lv_d, col, col_ok)
            scale = tl.load(root_at + col, mask=col_ok, other=0.0)
            u = (point - _row(mean_at, stride_mu_d, col, col_ok)[None, :]) * scale[None, :]
            density = _density(u, lv[None, :], PER_DIM)
            density = tl.where(((begin <= n) & (n < end))[:, None], density, float("-inf"))
            peak, part = _include(peak, part, density, 1.0)
            mean_at += stride_mu_n
            lv_at += stride_lv_n
            root_at += dim
        largest, total = _include(largest, total, peak, part)
    value = largest + _log(total)
    norm = _log((end - begin).to(tl.float32)) + (_HALF_LOG_2PI if PER_DIM else _HALF_LOG_2PI * dim)
    out = sample * rows + row[:, None]
    ok = row_ok[:, None]
    if PER_DIM:
        out = out * dim + col[None, :]
        ok = ok & col_ok[None, :]
    tl.store(lse + out, value, mask=ok)
    tl.store(logq + out, value - norm[:, None], mask=ok)


@triton.jit
def aggregate_bwd_z_kernel(
    grad, lse, z, mu, logvar, root, cu_z, cu_posteriors, dz, rows, posteriors, dim, groups, steps, blocks,
    stride_g_s, stride_g_k, stride_g_d, stride_z_s, stride_z_k, stride_z_d,
    stride_mu_n, stride_mu_d, stride_lv_n, stride_lv_d,
    HAS_GROUPS: tl.constexpr, PER_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample, row_block = divided_program(blocks)
    row = row_block * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    col = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    col_ok = col < dim
    ok = row_ok[:, None] & col_ok[None, :]
    at = z + sample * stride_z_s + row[:, None] * stride_z_k + col[None, :] * stride_z_d
    point = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    begin, end = _members(row, row_ok, cu_z, cu_posteriors, groups, steps, posteriors, HAS_GROUPS)
    first, last = tl.min(begin, 0), tl.max(end, 0)
    mean_at, lv_at, root_at = mu + first * stride_mu_n, logvar + first * stride_lv_n, root + first * dim
    grad_at = grad + sample * stride_g_s + row[:, None] * stride_g_k
    if PER_DIM:
        level = tl.load(lse + (sample * rows + row[:, None]) * dim + col[None, :], mask=ok, other=0.0)
        g = tl.load(grad_at + col[None, :] * stride_g_d, mask=ok, other=0.0)
    else:
        level = tl.load(lse + sample * rows + row[:, None], mask=row_ok[:, None], other=0.0)
        g = tl.load(grad_at, mask=row_ok[:, None], other=0.0)

    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(first, last, _CHAIN):
        part = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for n in range(start, tl.minimum(start + _CHAIN, last)):
            lv = _row(lv_at, stride_lv_d, col, col_ok)
            scale = tl.load(root_at + col, mask=col_ok, other=0.0)
            u = (point - _row(mean_at, stride_mu_d, col, col_ok)[None, :]) * scale[None, :]
            weight = exp_(_density(u, lv[None, :], PER_DIM) - level)
            inside = ((begin <= n) & (n < end))[:, None]
            part += tl.where(inside, weight * u * scale[None, :], 0.0)
            mean_at += stride_mu_n
            lv_at += stride_lv_n
            root_at += dim
        total += part
    out = (sample * rows + row[:, None]) * dim + col[None, :]
    tl.store(dz + out, cast(-2.0 * g * total, dz.dtype.element_ty), mask=ok)


@triton.jit
def aggregate_bwd_posterior_kernel(
    grad, lse, z, mu, logvar, root, ratio, cu_z, cu_posteriors, dmu, dlogvar,
    samples, rows, posteriors, dim, groups, steps,
    stride_g_s, stride_g_k, stride_g_d, stride_z_s, stride_z_k, stride_z_d,
    stride_mu_n, stride_mu_d, stride_lv_n, stride_lv_d,
    HAS_GROUPS: tl.constexpr, PER_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n_ok = n < posteriors
    col = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    col_ok = col < dim
    ok = n_ok[:, None] & col_ok[None, :]
    mean = tl.load(mu + n[:, None] * stride_mu_n + col[None, :] * stride_mu_d, mask=ok, other=0.0).to(tl.float32)
    lv = tl.load(logvar + n[:, None] * stride_lv_n + col[None, :] * stride_lv_d, mask=ok, other=0.0).to(tl.float32)
    out = n[:, None] * dim + col[None, :]
    scale, share = tl.load(root + out, mask=ok, other=0.0), tl.load(ratio + out, mask=ok, other=0.0)
    begin, end = _members(n, n_ok, cu_posteriors, cu_z, groups, steps, rows, HAS_GROUPS)
    first, last = tl.min(begin, 0), tl.max(end, 0)

    pull = tl.zeros((ROWS, BLOCK_D), tl.float32)
    spread = tl.zeros((ROWS, BLOCK_D), tl.float32)
    z_sample, grad_sample = z + first * stride_z_k, grad + first * stride_g_k
    lse_sample = lse + first * (dim if PER_DIM else 1)
    for _ in range(samples):
        z_at, grad_at, lse_at = z_sample, grad_sample, lse_sample
        for start in range(first, last, _CHAIN):
            part_pull = tl.zeros((ROWS, BLOCK_D), tl.float32)
            part_spread = tl.zeros((ROWS, BLOCK_D), tl.float32)
            for k in range(start, tl.minimum(start + _CHAIN, last)):
                u = (_row(z_at, stride_z_d, col, col_ok)[None, :] - mean) * scale
                density = _density(u, lv, PER_DIM)
                if PER_DIM:
                    level = tl.load(lse_at + col, mask=col_ok, other=0.0)[None, :]
                    g = _row(grad_at, stride_g_d, col, col_ok)[None, :]
                else:
                    level = tl.load(lse_at)
                    g = tl.load(grad_at)
                inside = ((begin <= k) & (k < end))[:, None]
                weight = g * exp_(density - level)
                part_pull += tl.where(inside, weight * u, 0.0)
                part_spread += tl.where(inside, weight * (share * (u * u) - 0.5), 0.0)
                z_at += stride_z_k
                grad_at += stride_g_k
                lse_at += dim if PER_DIM else 1
            pull += part_pull
            spread += part_spread
        z_sample += stride_z_s
        grad_sample += stride_g_s
        lse_sample += rows * (dim if PER_DIM else 1)
    tl.store(dmu + out, cast(2.0 * scale * pull, dmu.dtype.element_ty), mask=ok)
    tl.store(dlogvar + out, cast(spread, dlogvar.dtype.element_ty), mask=ok)
