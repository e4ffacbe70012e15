"""latent_kv on CUDA: products on tensor cores, each with what follows it (bias, dropout, cast, AdamW) in its epilogue.

Rows are the (head, slot, dim) of one layer and side, flattened; a group is one (layer, side). fp32 operands are
multiplied in three TF32 products (tf32x3), whose error is that of fp32. A sentence's dropout stream is a row of
`streams` int64 [batch, 4] = (seed, offset, batch size, index) of the forward it belonged to, so that gradients of
several micro-batches form one batch here. Sums over splits are made by torch in a fixed order: bits do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .. import backend, philox
from ..launch import TRITON_TYPES, CompileCase, Config, launch
from ..triton_math import cast, keep_tile

# ---- device code -----------------------------------------------------------------------------------------------------


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
    pid = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    layer = group // 2
    side = group % 2
    batch_blocks = (batch + BLOCK_B - 1) // BLOCK_B
    row0 = pid // batch_blocks * BLOCK_R  # neighbours share the weights
    row = row0 + tl.arange(0, BLOCK_R)
    b = pid % batch_blocks * BLOCK_B + tl.arange(0, BLOCK_B)
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
    splits = tl.num_programs(0)
    b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.program_id(2).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = k < nz
    group_blocks = (rows + BLOCK_R - 1) // BLOCK_R
    sums = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for block in range(split * blocks // splits, (split + 1) * blocks // splits):
        group = block // group_blocks
        row0 = block % group_blocks * BLOCK_R
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
    splits = tl.num_programs(0)
    b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    c = tl.program_id(2).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    group_blocks = (rows + BLOCK_R - 1) // BLOCK_R
    sums = tl.zeros((BLOCK_B, BLOCK_B), tl.float32)
    for block in range(split * blocks // splits, (split + 1) * blocks // splits):
        group = block // group_blocks
        row0 = block % group_blocks * BLOCK_R
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
    DROPOUT: tl.constexpr, WIDEN: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """AdamW of one tile of the weight. hyper: fp32 clip, 1 - lr * decay, lr / (1 - beta1^t), sqrt(1 - beta2^t)."""
    group = tl.program_id(1).to(tl.int64)
    layer = group // 2
    side = group % 2
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_R
    row = row0 + tl.arange(0, BLOCK_R)
    k = tl.program_id(2).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    g, _ = _weight_gradient_tile(
        grad, z, streams, group, row0, k, batch, nz, rows, slots, dim, threshold,
        stride_g_l, stride_g_s, stride_g_b, stride_g_h, stride_g_m, DROPOUT, WIDEN, OPERAND, BLOCK_R, BLOCK_B, BLOCK_K,
    )  # fmt: skip
    mask = (row < rows)[:, None] & (k < nz)[None, :]
    g = g * scale * tl.load(hyper)
    at_m = layer * stride_m_l + side * stride_m_s + _row_offset(row, slots, dim, stride_m_h, stride_m_m, stride_m_d)
    at_m = exp_avg + at_m[:, None] + k[None, :]
    m = tl.load(at_m, mask=mask, other=0.0).to(tl.float32)
    m = m + rest1 * (g - m)
    tl.store(at_m, cast(m, exp_avg.dtype.element_ty), mask=mask)
    at_v = layer * stride_v_l + side * stride_v_s + _row_offset(row, slots, dim, stride_v_h, stride_v_m, stride_v_d)
    at_v = exp_avg_sq + at_v[:, None] + k[None, :]
    v = tl.load(at_v, mask=mask, other=0.0).to(tl.float32)
    v = beta2 * v + rest2 * g * g
    tl.store(at_v, cast(v, exp_avg_sq.dtype.element_ty), mask=mask)
    at_w = layer * stride_w_l + side * stride_w_s + _row_offset(row, slots, dim, stride_w_h, stride_w_m, stride_w_d)
    at_w = weight + at_w[:, None] + k[None, :]
    w = tl.load(at_w, mask=mask, other=0.0).to(tl.float32)
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + tl.load(hyper + 3)) + eps
    w = w * tl.load(hyper + 1) - tl.div_rn(tl.load(hyper + 2) * m, denominator)
    tl.store(at_w, cast(w, weight.dtype.element_ty), mask=mask)


# ---- configurations --------------------------------------------------------------------------------------------------

#: Programs along a split sum: two for each of an H200's 132 multiprocessors.
SPLITS = 264

_BATCH_BLOCKS = (16, 32, 64)
_DEPTHS = (16, 32, 64)


def _power(n: int, choices: Sequence[int]) -> int:
    return min(choices[-1], max(choices[0], triton.next_power_of_2(max(1, n))))


# Sizes are those at which nothing spills on sm_80, sm_90 and sm_100 (the compile gate checks): 64-bit addresses and the
# two halves of an fp32 operand take most of the registers.


def _forward_config(batch: int, nz: int, wide: bool) -> Config:
    sizes = {
        "BLOCK_R": 64,
        "BLOCK_B": _power(batch, _BATCH_BLOCKS),
        "BLOCK_K": _power(nz, (16, 32) if wide else _DEPTHS),
    }
    return Config(sizes, num_warps=8, num_stages=3)


def _split_config(batch: int, nz: int) -> Config:
    sizes = {"BLOCK_R": 32, "BLOCK_B": _power(batch, _BATCH_BLOCKS), "BLOCK_K": _power(nz, _DEPTHS)}
    return Config(sizes, num_warps=8, num_stages=2)


def _gram_config(batch: int) -> Config:
    return Config({"BLOCK_R": 32, "BLOCK_B": _power(batch, _BATCH_BLOCKS)}, num_warps=8, num_stages=2)


def _tile_config(batch: int, nz: int) -> Config:
    sizes = {"BLOCK_R": 32, "BLOCK_B": _power(batch, (16, 32)), "BLOCK_K": _power(nz, _DEPTHS)}
    return Config(sizes, num_warps=8, num_stages=2)


# ---- launchers -------------------------------------------------------------------------------------------------------


def _dense_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous() if x.shape[-1] > 1 and x.stride(-1) != 1 else x


def _weight_strides(weight: torch.Tensor) -> tuple[int, ...]:
    return weight.stride()[:5]


def _memory_strides(memory: torch.Tensor) -> tuple[int, ...]:
    return memory.stride()[:5]


def _streams(zs: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor], dropout: float) -> torch.Tensor:
    """int64 [batch, 4]: seed, offset, size and index of each sentence's own forward; anything without dropout."""
    if dropout == 0.0:
        return zs[0]
    rows = []
    for z, seed in zip(zs, seeds, strict=True):
        size = z.shape[0]
        index = torch.arange(size, dtype=torch.int64, device=z.device)
        rows.append(torch.stack((*seed.expand(size, 2).unbind(1), torch.full_like(index, size), index), dim=1))
    return torch.cat(rows)


def _operand_type(weight: torch.Tensor, grad: torch.Tensor) -> Any:
    """What the backward products multiply: half precision where gradient and weight are both of it, else fp32."""
    half = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return half[weight.dtype] if weight.dtype == grad.dtype and weight.dtype in half else tl.float32


def _dropout_arguments(dropout: float) -> tuple[int, float]:
    return philox.dropout_threshold(dropout), 1.0 / (1.0 - dropout)


def latent_kv_into(z, weight, bias, dropout, seed, memory) -> None:
    """The Triton form of lmvae_fast::latent_kv_out, and of latent_kv_fwd with memory just made."""
    weight, z = _dense_last(weight), z.contiguous()
    groups, rows, nz = weight.shape[0] * 2, weight[0, 0, ..., 0].numel() if weight.shape[0] else 0, weight.shape[-1]
    batch = z.shape[0]
    config = _forward_config(batch, nz, weight.dtype == torch.float32)
    row_blocks = triton.cdiv(rows, config.constants["BLOCK_R"])
    grid = (row_blocks * triton.cdiv(batch, config.constants["BLOCK_B"]), groups)
    launch(
        latent_kv_fwd_kernel, grid, z.device, config,
        z, weight, z if bias is None else bias.contiguous(), _streams([z], [seed], dropout), memory,
        batch, nz, rows, weight.shape[3], weight.shape[4], *_dropout_arguments(dropout),
        *_weight_strides(weight), *_memory_strides(memory),
        HAS_BIAS=bias is not None, DROPOUT=dropout > 0.0, WIDEN=backend.INTERPRET,
    )  # fmt: skip


class _Gradients:
    """The memory's gradients of one or several forwards as one batch, with what every kernel takes of them."""

    def __init__(self, weight, grads, zs, seeds, dropout):
        one = len(grads) == 1
        self.grad = _dense_last(grads[0]) if one else torch.cat(list(grads), dim=2)
        self.z = zs[0].contiguous() if one else torch.cat(list(zs))
        self.streams = _streams(zs, seeds, dropout)
        self.batch, self.nz = self.z.shape
        self.groups, self.slots, self.dim = weight.shape[0] * 2, weight.shape[3], weight.shape[4]
        self.rows = weight.shape[2] * self.slots * self.dim
        self.threshold, self.scale = _dropout_arguments(dropout)
        self.dropout = dropout
        self.strides = _memory_strides(self.grad)
        self.operand = _operand_type(weight, self.grad)
        self.device = weight.device
        self.flags = {"DROPOUT": dropout > 0.0, "WIDEN": backend.INTERPRET}

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.batch, self.nz, self.rows, self.slots, self.dim

    def blocks(self, config: Config) -> int:
        return self.groups * triton.cdiv(self.rows, config.constants["BLOCK_R"])

    def tile_grid(self, config: Config) -> tuple[int, int, int]:
        row_blocks = triton.cdiv(self.rows, config.constants["BLOCK_R"])
        return row_blocks, self.groups, triton.cdiv(self.nz, config.constants["BLOCK_K"])


def _dz(a: _Gradients, weight: torch.Tensor) -> torch.Tensor:
    config = _split_config(a.batch, a.nz)
    blocks = a.blocks(config)
    splits = max(1, min(SPLITS, blocks))
    partial = torch.empty((splits, a.batch, a.nz), dtype=torch.float32, device=a.device)
    grid = (splits, triton.cdiv(a.batch, config.constants["BLOCK_B"]), triton.cdiv(a.nz, config.constants["BLOCK_K"]))
    launch(
        latent_kv_dz_kernel, grid, a.device, config,
        a.grad, weight, a.streams, partial, *a.sizes, blocks, a.threshold, a.scale,
        *a.strides, *_weight_strides(weight),
        OPERAND=a.operand, **a.flags,
    )  # fmt: skip
    return partial.sum(0)


def _dw(a: _Gradients, dweight=None, dbias=None, norms=None) -> None:
    config = _tile_config(a.batch, a.nz)
    parts = a.tile_grid(config)
    if dweight is None and norms is None:
        parts = (*parts[:2], 1)
    anything = a.z
    launch(
        latent_kv_dw_kernel, parts, a.device, config,
        a.grad, a.z, a.streams, *(anything if x is None else x for x in (dweight, dbias, norms)),
        *a.sizes, a.threshold, a.scale, *a.strides,
        NEED_WEIGHT=dweight is not None, NEED_BIAS=dbias is not None, NEED_NORM=norms is not None,
        OPERAND=a.operand, **a.flags,
    )  # fmt: skip


def latent_kv_bwd(grad, z, weight, dropout, seed, need_z, need_weight, need_bias):
    """The Triton form of lmvae_fast::latent_kv_bwd."""
    weight = _dense_last(weight)
    a = _Gradients(weight, [grad], [z], [seed], dropout)
    empty = z.new_empty
    dz = _dz(a, weight).to(z.dtype) if need_z else empty((0,))
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else None
    dbias = torch.empty(weight.shape[:-1], dtype=weight.dtype, device=weight.device) if need_bias else None
    if need_weight or need_bias:
        _dw(a, dweight, dbias)
    return dz, empty((0,)) if dweight is None else dweight, empty((0,)) if dbias is None else dbias


def latent_kv_norm(weight, grads, zs, seeds, dropout):
    """The Triton form of lmvae_fast::latent_kv_norm: by Gram matrices up to a batch of nz, else by tiles of dW."""
    a = _Gradients(weight, grads, zs, seeds, dropout)
    if a.batch > a.nz:
        programs = torch.empty(a.tile_grid(_tile_config(a.batch, a.nz)), dtype=torch.float32, device=a.device)
        _dw(a, norms=programs)
        return programs.sum(dtype=torch.float64).float()
    config = _gram_config(a.batch)
    blocks = a.blocks(config)
    splits = max(1, min(SPLITS, blocks))
    partial = torch.empty((splits, a.batch, a.batch), dtype=torch.float32, device=a.device)
    side = triton.cdiv(a.batch, config.constants["BLOCK_B"])
    launch(
        latent_kv_gram_kernel, (splits, side, side), a.device, config,
        a.grad, a.streams, partial, a.batch, a.rows, a.slots, a.dim, blocks, a.threshold, *a.strides, **a.flags,
    )  # fmt: skip
    z = a.z.double()
    gram = partial.sum(0, dtype=torch.float64) * (a.scale * a.scale)
    return (gram * (z @ z.T)).sum().clamp_min(0.0).float()


def latent_kv_adamw(
    weight, exp_avg, exp_avg_sq, grads, zs, seeds, dropout, step, lr, clip, beta1, beta2, eps, weight_decay
) -> None:
    """The Triton form of lmvae_fast::latent_kv_adamw; step, lr and clip are read on the device."""
    a = _Gradients(weight, grads, zs, seeds, dropout)
    t, rate = step.double(), lr.double()
    terms = (clip.double(), 1.0 - rate * weight_decay, rate / (1.0 - beta1**t), (1.0 - beta2**t).sqrt())
    hyper = torch.stack([x.reshape(()) for x in terms]).float()
    config = _tile_config(a.batch, a.nz)
    launch(
        latent_kv_adamw_kernel, a.tile_grid(config), a.device, config,
        a.grad, a.z, a.streams, weight, exp_avg, exp_avg_sq, hyper, *a.sizes, a.threshold, a.scale,
        1.0 - beta1, beta2, 1.0 - beta2, eps,
        *a.strides, *_weight_strides(weight), *_weight_strides(exp_avg), *_weight_strides(exp_avg_sq),
        OPERAND=a.operand, **a.flags,
    )  # fmt: skip


# ---- compile gate ----------------------------------------------------------------------------------------------------


def _strides(letter: str, names: str, last: int | str | None = None) -> dict[str, int | str]:
    out: dict[str, int | str] = {f"stride_{letter}_{name}": "i32" for name in names}
    return out if last is None else {**out, f"stride_{letter}_d": last}


def _cases() -> list[CompileCase]:
    cases = []
    sizes = dict.fromkeys(("batch", "nz", "rows", "slots", "dim", "blocks", "threshold"), "i32")
    scalars = dict.fromkeys(("scale", "rest1", "beta2", "rest2", "eps"), "fp32")
    strides = {**_strides("g", "lsbhm"), **_strides("o", "lsbhm")}
    for letter in "wmv":
        strides.update(_strides(letter, "lshm", "i32"))
    names = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
    # (weight, memory): one type, and an fp32 master weight with bf16 memory. Dropout costs registers, so every type is
    # compiled with it at the largest sizes; the other sizes once in each width.
    pairs = [(t, t) for t in TRITON_TYPES.values()] + [("fp32", "bf16")]
    others = ((16, 16, False), (32, 32, False), (64, 128, False))
    for weight, memory in pairs:
        shapes = ((64, 128, True), *(others if (weight, memory) in (("fp32", "fp32"), ("bf16", "bf16")) else ()))
        io = {
            **sizes, **scalars, **strides, "streams": "*i64", "partial": "*fp32", "norms": "*fp32", "hyper": "*fp32",
            "exp_avg": "*fp32", "exp_avg_sq": "*fp32", "grad": f"*{memory}", "memory": f"*{memory}",
            **dict.fromkeys(("z", "weight", "bias", "dweight", "dbias"), f"*{weight}"),
        }  # fmt: skip
        operand = {"OPERAND": names[weight] if weight == memory else tl.float32}
        for batch, nz, dropout in shapes:
            tag = f"{weight}-{memory}-{batch}-{nz}" + ("-dropout" if dropout else "")
            flags = {"DROPOUT": dropout, "WIDEN": False}

            def add(name: str, kernel: Any, config: Config, io=io, tag=tag, flags=flags, **constants: Any) -> None:
                signature = {n: kind for n, kind in io.items() if n in kernel.arg_names}
                cases.append(
                    CompileCase(f"{name}-{tag}", kernel, signature, config, {**flags, **constants}, tensor_cores=True)
                )

            tile, split = _tile_config(batch, nz), _split_config(batch, nz)
            need = {"NEED_WEIGHT": True, "NEED_BIAS": True, "NEED_NORM": False}
            norm = {"NEED_WEIGHT": False, "NEED_BIAS": False, "NEED_NORM": True}
            add("fwd", latent_kv_fwd_kernel, _forward_config(batch, nz, weight == "fp32"), HAS_BIAS=True)
            add("dz", latent_kv_dz_kernel, split, **operand)
            add("dw", latent_kv_dw_kernel, tile, **need, **operand)
            add("norm", latent_kv_dw_kernel, tile, **norm, **operand)
            add("adamw", latent_kv_adamw_kernel, tile, **operand)
            add("gram", latent_kv_gram_kernel, _gram_config(batch))
    return cases


COMPILE_CASES = _cases()
