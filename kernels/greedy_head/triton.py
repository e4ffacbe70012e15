"""The greatest logit of a few rows on CUDA, of logits that are never written: two kernels, one over the head's weight."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..launch import TRITON_TYPES, CompileCase, Config, launch
from ..triton_math import cast

# ---- device code -----------------------------------------------------------------------------------------------------


@triton.jit
def _ranked(logit, column):
    """One number per logit that orders as logits do: NaN above all, of equal ones the lower column first. 0.0 is -0.0."""
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where(logit == logit, order, 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def greedy_product_kernel(
    hidden, weight, partial, rows, vocab, depth, blocks, stride_hidden, stride_weight,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The greatest of a block of the vocabulary, for every row of a block of rows."""
    # Blocks of rows are neighbours: what one reads of the weight, the next finds in the cache.
    block = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = block * BLOCK_V + tl.arange(0, BLOCK_V)
    k = tl.arange(0, BLOCK_K)
    x_at = hidden + row[:, None] * stride_hidden + k[None, :]
    w_at = weight + column[:, None] * stride_weight + k[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = (start + k < depth)[None, :]
        x = tl.load(x_at + start, mask=(row < rows)[:, None] & inside, other=0.0)
        w = tl.load(w_at + start, mask=(column < vocab)[:, None] & inside, other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    # As a product in this dtype rounds its logits: what is equal then is a tie.
    logit = cast(total, hidden.dtype.element_ty).to(tl.float32)
    ranked = _ranked(logit, column[None, :])
    ranked = tl.where((column < vocab)[None, :], ranked, -0x7FFFFFFFFFFFFFFF)
    tl.store(partial + row * blocks + block, tl.max(ranked, axis=1), mask=row < rows)


@triton.jit
def greedy_choice_kernel(partial, ids, logits, blocks, BLOCK: tl.constexpr):
    """The greatest of a row's blocks."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), -0x7FFFFFFFFFFFFFFF, tl.int64)
    for start in range(0, blocks, BLOCK):
        at = start + lane
        most = tl.maximum(most, tl.load(partial + row * blocks + at, mask=at < blocks, other=-0x7FFFFFFFFFFFFFFF))
    best = tl.max(most, axis=0)
    order = (best >> 32).to(tl.int32)
    value = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)  # of NaN's own order: a NaN
    tl.store(ids + row, 0x7FFFFFFF - (best & 0xFFFFFFFF))
    tl.store(logits + row, value)


# ---- configurations and launcher -------------------------------------------------------------------------------------

# Half types by rows of a program: all that it has of the weight is read once for them. fp32 multiplies at full precision.
_HALF = {
    16: Config({"BLOCK_T": 16, "BLOCK_V": 64, "BLOCK_K": 64}, num_warps=4, num_stages=4),
    64: Config({"BLOCK_T": 64, "BLOCK_V": 128, "BLOCK_K": 64}, num_warps=4, num_stages=3),
}
_FULL = Config({"BLOCK_T": 16, "BLOCK_V": 64, "BLOCK_K": 32}, num_warps=4, num_stages=2)
_CHOICE = Config({"BLOCK": 1024}, num_warps=4)


def _config(rows: int, dtype: torch.dtype) -> Config:
    return _FULL if dtype == torch.float32 else _HALF[16 if rows <= 16 else 64]


def greedy_product(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton form of lmvae_fast::greedy_product."""
    (rows, depth), vocab = hidden.shape, weight.shape[0]
    config = _config(rows, hidden.dtype)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    blocks = triton.cdiv(vocab, config.constants["BLOCK_V"])
    partial = torch.empty((rows, blocks), dtype=torch.int64, device=hidden.device)
    ids = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    logits = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    launch(
        greedy_product_kernel, (triton.cdiv(rows, config.constants["BLOCK_T"]), blocks), hidden.device, config,
        hidden, weight, partial, rows, vocab, depth, blocks, hidden.stride(0), weight.stride(0),
    )  # fmt: skip
    launch(greedy_choice_kernel, (rows,), hidden.device, _CHOICE, partial, ids, logits, blocks)
    return ids, logits


# ---- compile gate ----------------------------------------------------------------------------------------------------


def _cases() -> list[CompileCase]:
    choice = {"partial": "*i64", "ids": "*i64", "logits": "*fp32", "blocks": "i32"}
    cases = [CompileCase("choice", greedy_choice_kernel, choice, _CHOICE, max_registers=64)]
    for dtype, name in TRITON_TYPES.items():
        signature = {
            "hidden": f"*{name}", "weight": f"*{name}", "partial": "*i64", "rows": "i32", "vocab": "i32", "depth": "i32",
            "blocks": "i32", "stride_hidden": "i32", "stride_weight": "i32",
        }  # fmt: skip
        half = dtype != torch.float32
        for rows in (16, 64) if half else (16,):
            case = CompileCase(f"product-{name}-{rows}", greedy_product_kernel, signature, _config(rows, dtype))
            even = replace(case, multiples=("depth", "stride_hidden", "stride_weight"), wide_loads=True)
            cases.append(replace(even, tensor_cores=half, warpgroup=half and rows == 64))
    return cases


COMPILE_CASES = _cases()
