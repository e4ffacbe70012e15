"""Device code of latent_kv: products on tensor cores, each with what follows it (bias, dropout, cast, AdamW) in its epilogue.

Rows are the (head, slot, dim) of one layer and side, flattened; a group is one (layer, side). fp32 operands are
multiplied in three TF32 products (tf32x3), whose error is that of fp32. A sentence's dropout stream is a row of
`streams` int64 [batch, 4] = (seed, offset, size of its batch, place in it), so that gradients of several forwards, or parts
of a batch that processes share, form one batch here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_math import cast, divided_program, keep_tile, share_of_program


@triton.jit
def _row_offset(row, slots, dim, stride_h, stride_m, stride_d):
    row = row.to(tl.int32)  # the rows of a group are fewer than 2^31, and 64-bit divisions are slow
    head_slot = row // dim
    d = (row % dim).to(tl.int64)
    head = (head_slot // slots).to(tl.int64)
    slot = (head_slot % slots).to(tl.int64)
    return head * stride_h + slot * stride_m + d * stride_d


@triton.jit
def _kept(streams, b, b_ok, group, row0, row_blocks, threshold, BLOCK_R: tl.constexpr):
    """Which elements of sentences b [BLOCK_B], rows row0.. of `group`, dropout keeps: boolean [BLOCK_B, BLOCK_R]."""
    at = streams + b * 4
    seed = tl.load(at, mask=b_ok, other=0)
    offset = tl.load(at + 1, mask=b_ok, other=0)
    size = tl.load(at + 2, mask=b_ok, other=0)
    index = tl.load(at + 3, mask=b_ok, other=0)
    first = (group * size + index) * row_blocks + row0 // 4
    return keep_tile(seed[:, None], offset[:, None], first, threshold, BLOCK_R // 4)


@triton.jit
def _operand(x, WIDEN: tl.constexpr):
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def latent_kv_fwd_kernel(
    z, weight, bias, streams, memory, batch, nz, rows, slots, dim, threshold, scale,
    stride_w_l, stride_w_s, stride_w_h, stride_w_m, stride_w_d,
    stride_o_l, stride_o_s, stride_o_b, stride_o_h, stride_o_m,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """memory[group, b, row] = dropout(weight[group, row] . z[b] + bias). z: dense [batch, nz]."""
    group = tl.program_id(1).to(tl.int64)
    layer = group // 2
    side = group % 2
    row_block, batch_block = divided_program((batch + BLOCK_B - 1) // BLOCK_B)  # neighbours share the weights
    row0 = row_block * BLOCK_R
    row = row0 + tl.arange(0, BLOCK_R)
    b = batch_block * BLOCK_B + tl.arange(0, BLOCK_B)
    row_ok = row < rows
    b_ok = b < batch
    w_row = layer * stride_w_l + side * stride_w_s + _row_offset(row, slots, dim, stride_w_h, stride_w_m, stride_w_d)
    sums = tl.zeros((BLOCK_R, BLOCK_B), tl.float32)
    for k0 in range(0, nz, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_ok = k < nz
        w = tl.load(weight + w_row[:, None] + k[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        x = tl.load(z + b[None, :] * nz + k[:, None], mask=k_ok[:, None] & b_ok[None, :], other=0.0)
        sums = tl.dot(_operand(w, WIDEN), _operand(x, WIDEN), sums, input_precision="tf32x3")
    value = tl.trans(sums)
    if HAS_BIAS:
        value += tl.load(bias + group * rows + row, mask=row_ok, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        keep = _kept(streams, b, b_ok, group, row0, (rows + 3) // 4, threshold, BLOCK_R)
        value = value * (keep.to(tl.float32) * scale)  # a product, so that Inf and NaN show as in torch
    to = layer * stride_o_l + side * stride_o_s + _row_offset(row, slots, dim, stride_o_h, stride_o_m, 1)
    at = memory + b[:, None] * stride_o_b + to[None, :]
    tl.store(at, cast(value, memory.dtype.element_ty), mask=b_ok[:, None] & row_ok[None, :])


@triton.jit
def _gradient_tile(
    grad, streams, group, b, batch, row0, rows, slots, dim, threshold,
    stride_g_l, stride_g_s, stride_g_b, stride_g_h, stride_g_m,
    DROPOUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The memory's gradient [BLOCK_B, BLOCK_R] of sentences b; dropped elements zeroed, the others not yet scaled."""
    row = row0 + tl.arange(0, BLOCK_R)
    b = b.to(tl.int64)
    group = group.to(tl.int64)
    b_ok = b < batch
    layer = group // 2
    side = group % 2
    at = layer * stride_g_l + side * stride_g_s + _row_offset(row, slots, dim, stride_g_h, stride_g_m, 1)
    mask = b_ok[:, None] & (row < rows)[None, :]
    g = tl.load(grad + b[:, None] * stride_g_b + at[None, :], mask=mask, other=0.0)
    if DROPOUT:
        keep = _kept(streams, b, b_ok, group, row0, (rows + 3) // 4, threshold, BLOCK_R)
        g = (g.to(tl.float32) * keep.to(tl.float32)).to(g.dtype)
    return g


@triton.jit
def latent_kv_dz_kernel(
    grad, weight, streams, partial, batch, nz, rows, slots, dim, blocks, threshold, scale,
    stride_g_l, stride_g_s, stride_g_b, stride_g_h, stride_g_m,
    stride_w_l, stride_w_s, stride_w_h, stride_w_m, stride_w_d,
    DROPOUT: tl.constexpr, WIDEN: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split, b, k] = sum over this split's row blocks of grad[b, row] * weight[row, k]."""
    split = tl.program_id(0).to(tl.int64)
    first, last = share_of_program(blocks)
    b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.program_id(2).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = k < nz
    group_blocks = (rows + BLOCK_R - 1) // BLOCK_R  # int32, like every index of a block
    sums = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for block in range(first, last):
        group = block // group_blocks
        row0 = (block % group_blocks).to(tl.int64) * BLOCK_R
        row = row0 + tl.arange(0, BLOCK_R)
        g = _gradient_tile(
            grad, streams, group, b, batch, row0, rows, slots, dim, threshold,
            stride_g_l, stride_g_s, stride_g_b, stride_g_h, stride_g_m, DROPOUT, BLOCK_R,
        )  # fmt: skip
        w_row = _row_offset(row, slots, dim, stride_w_h, stride_w_m, stride_w_d)
        w_row += (group // 2).to(tl.int64) * stride_w_l + (group % 2).to(tl.int64) * stride_w_s
        w = tl.load(weight + w_row[:, None] + k[None, :], mask=(row < rows)[:, None] & k_ok[None, :], other=0.0)
        sums = tl.dot(_operand(g.to(OPERAND), WIDEN), _operand(w.to(OPERAND), WIDEN), sums, input_precision="tf32x3")
    at = partial + (split * batch + b[:, None]) * nz + k[None, :]
    tl.store(at, sums * scale, mask=(b < batch)[:, None] & k_ok[None, :])


@triton.jit
def _weight_gradient_tile(
    grad, z, streams, group, row0, k, batch, nz, rows, slots, dim, threshold,
    stride_g_l, stride_g_s, stride_g_b, stride_g_h, stride_g_m,
    DROPOUT: tl.constexpr, WIDEN: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum_b grad[b, row] * z[b, k] (without dropout's scale), and sum_b grad[b, row]: [BLOCK_R, BLOCK_K], [BLOCK_R]."""
    sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    bias_sums = tl.zeros((BLOCK_R,), tl.float32)
    for b0 in range(0, batch, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B).to(tl.int64)
        g = _gradient_tile(
            grad, streams, group, b, batch, row0, rows, slots, dim, threshold,
            stride_g_l, stride_g_s, stride_g_b, stride_g_h, stride_g_m, DROPOUT, BLOCK_R,
        )  # fmt: skip
        x = tl.load(z + b[:, None] * nz + k[None, :], mask=(b < batch)[:, None] & (k < nz)[None, :], other=0.0)
        turned = tl.trans(_operand(g.to(OPERAND), WIDEN))
        sums = tl.dot(turned, _operand(x.to(OPERAND), WIDEN), sums, input_precision="tf32x3")
        bias_sums += tl.sum(g.to(tl.float32), axis=0)
    return sums, bias_sums


@triton.jit
def latent_kv_dw_kernel(
    grad, z, streams, dweight, dbias, norms, batch, nz, rows, slots, dim, threshold, scale,
    stride_g_l, stride_g_s, stride_g_b, stride_g_h, stride_g_m,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_NORM: tl.constexpr,
    DROPOUT: tl.constexpr, WIDEN: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dense dW [group, rows, nz] and db [group, rows], or one sum of squares of dW per program."""
    group = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_R
    row = row0 + tl.arange(0, BLOCK_R)
    k = part * BLOCK_K + tl.arange(0, BLOCK_K)
    sums, bias_sums = _weight_gradient_tile(
        grad, z, streams, group, row0, k, batch, nz, rows, slots, dim, threshold,
        stride_g_l, stride_g_s, stride_g_b, stride_g_h, stride_g_m, DROPOUT, WIDEN, OPERAND, BLOCK_R, BLOCK_B, BLOCK_K,
    )  # fmt: skip
    sums *= scale
    if NEED_WEIGHT:
        at = dweight + (group * rows + row[:, None]) * nz + k[None, :]
        tl.store(at, cast(sums, dweight.dtype.element_ty), mask=(row < rows)[:, None] & (k < nz)[None, :])
    if NEED_BIAS:
        at = dbias + group * rows + row
        tl.store(at, cast(bias_sums * scale, dbias.dtype.element_ty), mask=row < tl.where(part == 0, rows, 0))
    if NEED_NORM:  # rows and columns beyond the tensors were loaded as zeros
        program = (part * tl.num_programs(1) + group) * tl.num_programs(0) + row0 // BLOCK_R
        tl.store(norms + program, tl.sum(tl.sum(sums * sums, axis=1), axis=0))


@triton.jit
def latent_kv_gram_kernel(
    grad, streams, partial, batch, rows, slots, dim, blocks, threshold,
    stride_g_l, stride_g_s, stride_g_b, stride_g_h, stride_g_m,
    DROPOUT: tl.constexpr, WIDEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """partial[split, b, c] = sum over this split's row blocks of grad[b, row] * grad[c, row] (not yet scaled)."""
    split = tl.program_id(0).to(tl.int64)
    first, last = share_of_program(blocks)
    b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    c = tl.program_id(2).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    group_blocks = (rows + BLOCK_R - 1) // BLOCK_R  # int32, like every index of a block
    sums = tl.zeros((BLOCK_B, BLOCK_B), tl.float32)
    for block in range(first, last):
        group = block // group_blocks
        row0 = (block % group_blocks).to(tl.int64) * BLOCK_R
        left = _gradient_tile(
            grad, streams, group, b, batch, row0, rows, slots, dim, threshold,
            stride_g_l, stride_g_s, stride_g_b, stride_g_h, stride_g_m, DROPOUT, BLOCK_R,
        )  # fmt: skip
        right = _gradient_tile(
            grad, streams, group, c, batch, row0, rows, slots, dim, threshold,
            stride_g_l, stride_g_s, stride_g_b, stride_g_h, stride_g_m, DROPOUT, BLOCK_R,
        )  # fmt: skip
        sums = tl.dot(_operand(left, WIDEN), tl.trans(_operand(right, WIDEN)), sums, input_precision="tf32x3")
    at = partial + (split * batch + b[:, None]) * batch + c[None, :]
    tl.store(at, sums, mask=(b < batch)[:, None] & (c < batch)[None, :])


@triton.jit
def latent_kv_adamw_kernel(
    grad, z, streams, weight, exp_avg, exp_avg_sq, hyper, batch, nz, rows, slots, dim, threshold, scale,
    rest1, beta2, rest2, eps,
    stride_g_l, stride_g_s, stride_g_b, stride_g_h, stride_g_m,
    stride_w_l, stride_w_s, stride_w_h, stride_w_m, stride_w_d,
    stride_m_l, stride_m_s, stride_m_h, stride_m_m, stride_m_d,
    stride_v_l, stride_v_s, stride_v_h, stride_v_m, stride_v_d,
    DROPOUT: tl.constexpr, WIDEN: tl.constexpr, OPERAND: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """AdamW of one tile of the weight. hyper: fp32 clip, 1 - lr * decay, lr / (1 - beta1^t), sqrt(1 - beta2^t)."""
    group = tl.program_id(1).to(tl.int64)
    layer = group // 2
    side = group % 2
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_R
    row = row0 + tl.arange(0, BLOCK_R)
    k = tl.program_id(2).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (row < rows)[:, None] & (k < nz)[None, :]
    at_m = layer * stride_m_l + side * stride_m_s + _row_offset(row, slots, dim, stride_m_h, stride_m_m, stride_m_d)
    at_m = exp_avg + at_m[:, None] + k[None, :]
    at_v = layer * stride_v_l + side * stride_v_s + _row_offset(row, slots, dim, stride_v_h, stride_v_m, stride_v_d)
    at_v = exp_avg_sq + at_v[:, None] + k[None, :]
    at_w = layer * stride_w_l + side * stride_w_s + _row_offset(row, slots, dim, stride_w_h, stride_w_m, stride_w_d)
    at_w = weight + at_w[:, None] + k[None, :]
    if EARLY:  # the product hides the latency of these, which are nearly all of the bytes
        m_before = tl.load(at_m, mask=mask, other=0.0)
        v_before = tl.load(at_v, mask=mask, other=0.0)
        w_before = tl.load(at_w, mask=mask, other=0.0)
    g, _ = _weight_gradient_tile(
        grad, z, streams, group, row0, k, batch, nz, rows, slots, dim, threshold,
        stride_g_l, stride_g_s, stride_g_b, stride_g_h, stride_g_m, DROPOUT, WIDEN, OPERAND, BLOCK_R, BLOCK_B, BLOCK_K,
    )  # fmt: skip
    g = g * scale * tl.load(hyper)
    if not EARLY:
        m_before = tl.load(at_m, mask=mask, other=0.0)
    m = m_before.to(tl.float32)
    m = m + rest1 * (g - m)
    tl.store(at_m, cast(m, exp_avg.dtype.element_ty), mask=mask)
    if not EARLY:
        v_before = tl.load(at_v, mask=mask, other=0.0)
    v = beta2 * v_before.to(tl.float32) + rest2 * g * g
    tl.store(at_v, cast(v, exp_avg_sq.dtype.element_ty), mask=mask)
    if not EARLY:
        w_before = tl.load(at_w, mask=mask, other=0.0)
    w = w_before.to(tl.float32)
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + tl.load(hyper + 3)) + eps
    w = w * tl.load(hyper + 1) - tl.div_rn(tl.load(hyper + 2) * m, denominator)
    tl.store(at_w, cast(w, weight.dtype.element_ty), mask=mask)
