"""row_product on CUDA: a program has some of the weight's rows, multiplies them by all rows of x, and finishes the result.

One to four rows are multiplied by a program's part of the weight as it lies in registers (`row_product_vector_kernel`): with a
few thousand inputs that part is loaded whole, before anything of x is asked for. On cards that let a kernel begin while the one
before it ends (sm_90 on), weights are on their way by then. Five to sixteen rows are a tile of tensor cores. The norm is
computed by every program for itself: rows are a few kilobytes in the cache, and a kernel for them costs more.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..frozen_layer.reference import ACTIVATIONS, GATED
from ..frozen_layer.triton import _activated
from ..launch import TRITON_TYPES, CompileCase, Config, launch
from ..triton_math import cast
from .ways import begins_early

_NONE, _RMS, _LAYER = (tl.constexpr(kind) for kind in range(3))  # norms

# ---- device code -----------------------------------------------------------------------------------------------------


@triton.jit
def _finished(total, gate, bias, added, column, columns, ok, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr,
              ACTIVATED: tl.constexpr, GATED: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """A product's sums, or two of them, with bias, activation and what is added; fp32, columns last."""
    at = tl.broadcast_to(column, total.shape)
    if HAS_BIAS:
        total += tl.load(bias + at, mask=ok, other=0.0).to(tl.float32)
        if GATED:
            gate += tl.load(bias + columns + at, mask=ok, other=0.0).to(tl.float32)
    if ACTIVATED:
        total, _ = _activated(total, SILU)
    if GATED:
        total = total * gate
    if HAS_ADDED:
        total += tl.load(added, mask=ok, other=0.0).to(tl.float32)
    return total


@triton.jit
def row_product_vector_kernel(
    x, weight, bias, norm_weight, norm_bias, added, out, rows, columns, depth, eps, stride_x, stride_weight, stride_added,
    NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr,
    ACTIVATED: tl.constexpr, GATED: tl.constexpr, SILU: tl.constexpr, ONE: tl.constexpr, DEPENDENT: tl.constexpr,
    SETTLED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # ONE: a row of the weight lies within BLOCK_K. columns: of the result; behind a gate the weight has as many rows again.
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    ok = column < columns
    w_at = weight + column[:, None] * stride_weight + k[None, :]
    u_at = w_at + (tl.full((), 0, tl.int64) + columns) * stride_weight if GATED else w_at
    if DEPENDENT and not SETTLED:
        gdc_wait()
    if ONE:
        inside = ok[:, None] & (k < depth)[None, :]
        w = tl.load(w_at, mask=inside, other=0.0)
        u = tl.load(u_at, mask=inside, other=0.0) if GATED else w
        if NORM != _NONE:
            factor = tl.load(norm_weight + k, mask=k < depth, other=0.0).to(tl.float32)
            if HAS_NORM_BIAS:
                offset = tl.load(norm_bias + k, mask=k < depth, other=0.0).to(tl.float32)
    if DEPENDENT:
        if SETTLED:
            gdc_wait()
        gdc_launch_dependents()  # whose programs start where there is room, and wait for the end of this kernel
    zero = tl.full((), 0, tl.int64)
    for index in range(rows):
        row = zero + index
        x_at = x + row * stride_x + k
        mean = 0.0
        scale = 1.0
        value = tl.load(x_at, mask=k < depth, other=0.0).to(tl.float32)
        if NORM != _NONE:
            if NORM == _LAYER:
                sums = value
                if not ONE:
                    for start in range(BLOCK_K, depth, BLOCK_K):
                        sums += tl.load(x_at + start, mask=start + k < depth, other=0.0).to(tl.float32)
                mean = tl.sum(sums, axis=0) / depth
            away = tl.where(k < depth, value - mean, 0.0)
            squares = away * away
            if not ONE:
                for start in range(BLOCK_K, depth, BLOCK_K):
                    more = tl.load(x_at + start, mask=start + k < depth, other=0.0).to(tl.float32)
                    away = tl.where(start + k < depth, more - mean, 0.0)
                    squares += away * away
            scale = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / depth + eps)
        total = tl.zeros((BLOCK_N,), tl.float32)
        gate = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, BLOCK_K if ONE else depth, BLOCK_K):
            last = start + k < depth
            if not ONE:
                value = tl.load(x_at + start, mask=last, other=0.0).to(tl.float32)
                inside = ok[:, None] & last[None, :]
                w = tl.load(w_at + start, mask=inside, other=0.0)
                u = tl.load(u_at + start, mask=inside, other=0.0) if GATED else w
                if NORM != _NONE:
                    factor = tl.load(norm_weight + start + k, mask=last, other=0.0).to(tl.float32)
                    if HAS_NORM_BIAS:
                        offset = tl.load(norm_bias + start + k, mask=last, other=0.0).to(tl.float32)
            if NORM != _NONE:
                value = (value - mean) * scale * factor
                if HAS_NORM_BIAS:
                    value += offset
                value = cast(value, x.dtype.element_ty).to(tl.float32)
                value = tl.where(last, value, 0.0)
            total += tl.sum(w.to(tl.float32) * value[None, :], axis=1)
            if GATED:
                gate += tl.sum(u.to(tl.float32) * value[None, :], axis=1)
        beside = added + row * stride_added + column
        total = _finished(total, gate, bias, beside, column, columns, ok, HAS_BIAS, HAS_ADDED, ACTIVATED, GATED, SILU)
        tl.store(out + row * columns + column, cast(total, out.dtype.element_ty), mask=ok)


@triton.jit
def row_product_tile_kernel(
    x, weight, bias, norm_weight, norm_bias, added, out, rows, columns, depth, eps, stride_x, stride_weight, stride_added,
    NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr,
    ACTIVATED: tl.constexpr, GATED: tl.constexpr, SILU: tl.constexpr, DEPENDENT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    row_ok, ok = row < rows, (row < rows)[:, None] & (column < columns)[None, :]
    x_at = x + row[:, None] * stride_x + k[None, :]
    w_at = weight + column[:, None] * stride_weight + k[None, :]
    u_at = w_at + (tl.full((), 0, tl.int64) + columns) * stride_weight if GATED else w_at
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    mean = tl.zeros((BLOCK_T,), tl.float32)
    scale = tl.full((BLOCK_T,), 1.0, tl.float32)
    if NORM != _NONE:
        if NORM == _LAYER:
            for start in range(0, depth, BLOCK_K):
                inside = row_ok[:, None] & (start + k < depth)[None, :]
                mean += tl.sum(tl.load(x_at + start, mask=inside, other=0.0).to(tl.float32), axis=1)
            mean = mean / depth
        squares = tl.zeros((BLOCK_T,), tl.float32)
        for start in range(0, depth, BLOCK_K):
            inside = row_ok[:, None] & (start + k < depth)[None, :]
            value = tl.load(x_at + start, mask=inside, other=0.0).to(tl.float32)
            away = tl.where(inside, value - mean[:, None], 0.0)
            squares += tl.sum(away * away, axis=1)
        scale = 1.0 / tl.sqrt_rn(squares / depth + eps)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        last = start + k < depth
        value = tl.load(x_at + start, mask=row_ok[:, None] & last[None, :], other=0.0)
        inside = (column < columns)[:, None] & last[None, :]
        w = tl.load(w_at + start, mask=inside, other=0.0)
        if NORM != _NONE:
            factor = tl.load(norm_weight + start + k, mask=last, other=0.0).to(tl.float32)
            normed = (value.to(tl.float32) - mean[:, None]) * scale[:, None] * factor[None, :]
            if HAS_NORM_BIAS:
                normed += tl.load(norm_bias + start + k, mask=last, other=0.0).to(tl.float32)[None, :]
            value = cast(tl.where(last[None, :], normed, 0.0), x.dtype.element_ty)
        total = tl.dot(value, tl.trans(w), total, input_precision="ieee")
        if GATED:
            u = tl.load(u_at + start, mask=inside, other=0.0)
            gate = tl.dot(value, tl.trans(u), gate, input_precision="ieee")
    beside = added + row[:, None] * stride_added + column[None, :]
    at = column[None, :]
    total = _finished(total, gate, bias, beside, at, columns, ok, HAS_BIAS, HAS_ADDED, ACTIVATED, GATED, SILU)
    tl.store(out + row[:, None] * columns + at, cast(total, out.dtype.element_ty), mask=ok)


# ---- configurations and launcher -------------------------------------------------------------------------------------

VECTOR_ROWS = 4  # rows up to which multiplying and adding keeps up with the memory
_WIDEST = 4096  # inputs that a program has of a weight's row at once


def _vector_config(depth: int, gated: bool, width: int) -> Config:
    """A program's columns and inputs, so that its part of the weight is some kilobytes. width: bytes of a number."""
    block_k = min(_WIDEST, max(128, triton.next_power_of_2(depth)))
    block_n = 4096 // (block_k * (2 if gated else 1) * (width // 2))
    # At the widest the assembler would rather spill than let three blocks run side by side instead of four.
    most = 168 if block_k == _WIDEST else None
    return Config({"BLOCK_N": max(1, min(8, block_n)), "BLOCK_K": block_k}, num_warps=4, max_registers=most)


_HALF_TILE = Config({"BLOCK_T": 16, "BLOCK_N": 16, "BLOCK_K": 128}, num_warps=4, num_stages=4)
_FULL_TILE = Config({"BLOCK_T": 16, "BLOCK_N": 16, "BLOCK_K": 64}, num_warps=4, num_stages=2)


def _tile_config(width: int) -> Config:
    return _HALF_TILE if width == 2 else _FULL_TILE


def _options(norm_weight, norm_bias, centred, bias, added, activation) -> dict[str, object]:
    return {
        "NORM": 0 if norm_weight is None else 2 if centred else 1, "HAS_NORM_BIAS": norm_bias is not None,
        "HAS_BIAS": bias is not None, "HAS_ADDED": added is not None, "ACTIVATED": activation >= 0,
        "GATED": activation >= 0 and ACTIVATIONS[activation] in GATED,
        "SILU": activation >= 0 and ACTIVATIONS[activation] == "swiglu",
    }  # fmt: skip


def row_product(x, weight, bias, norm_weight, norm_bias, eps, centred, activation, added, settled):
    """The Triton form of lmvae_fast::row_product."""
    (rows, depth), options = x.shape, _options(norm_weight, norm_bias, centred, bias, added, activation)
    columns = weight.shape[0] // 2 if options["GATED"] else weight.shape[0]
    out = x.new_empty((rows, columns))
    x, weight, added = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (x, weight, added))
    bias, norm_weight, norm_bias = (t if t is None else t.contiguous() for t in (bias, norm_weight, norm_bias))
    dependent = begins_early(x.device)
    given = (
        x, weight, weight if bias is None else bias, weight if norm_weight is None else norm_weight,
        weight if norm_bias is None else norm_bias, x if added is None else added, out, rows, columns, depth, eps,
        x.stride(0), weight.stride(0), 0 if added is None else added.stride(0),
    )  # fmt: skip
    if not rows:
        return out
    if rows <= VECTOR_ROWS:
        config = _vector_config(depth, bool(options["GATED"]), x.element_size())
        options |= {"ONE": depth <= config.constants["BLOCK_K"], "SETTLED": settled}
        kernel, grid = row_product_vector_kernel, (triton.cdiv(columns, config.constants["BLOCK_N"]),)
    else:
        config = _tile_config(x.element_size())
        grid = tuple(
            triton.cdiv(size, config.constants[block]) for size, block in ((columns, "BLOCK_N"), (rows, "BLOCK_T"))
        )
        kernel = row_product_tile_kernel
    launch(kernel, grid, x.device, replace(config, dependent=dependent), *given, **options, DEPENDENT=dependent)
    return out


# ---- compile gate ----------------------------------------------------------------------------------------------------


def _cases() -> list[CompileCase]:
    """Products as decoders have them: into attention, out of it, and both of an MLP, plain and gated."""
    parts = {
        "layer": {"NORM": 2, "HAS_NORM_BIAS": True, "HAS_BIAS": True}, "rms": {"NORM": 1},
        "layer-gelu": {"NORM": 2, "HAS_NORM_BIAS": True, "HAS_BIAS": True, "ACTIVATED": True},
        "rms-swiglu": {"NORM": 1, "ACTIVATED": True, "GATED": True, "SILU": True},
        "rms-geglu": {"NORM": 1, "ACTIVATED": True, "GATED": True},
        "added": {"HAS_BIAS": True, "HAS_ADDED": True},
    }  # fmt: skip
    flags = ("HAS_NORM_BIAS", "HAS_BIAS", "HAS_ADDED", "ACTIVATED", "GATED", "SILU")
    cases = []
    for dtype, name in TRITON_TYPES.items():
        io, width = f"*{name}", dtype.itemsize
        signature = {
            **dict.fromkeys(("x", "weight", "bias", "norm_weight", "norm_bias", "added", "out"), io),
            **dict.fromkeys(("rows", "columns", "depth", "stride_x", "stride_weight", "stride_added"), "i32"), "eps": "fp32",
        }  # fmt: skip
        even = ("depth", "stride_x", "stride_weight")
        for part, given in parts.items():
            options = {"NORM": 0, **dict.fromkeys(flags, False), **given}
            for depth in (768, 3072, 11008) if dtype == torch.bfloat16 else (768,):
                config = _vector_config(depth, bool(options["GATED"]), width)
                one = depth <= config.constants["BLOCK_K"]
                for tag, dependent, settled in (
                    ("", False, False),
                    ("-dependent", True, True),
                    ("-waiting", True, False),
                ):
                    if tag == "-waiting" and part != "layer":
                        continue
                    case = CompileCase(
                        f"vector-{name}-{part}-{depth}{tag}", row_product_vector_kernel, signature,
                        replace(config, dependent=dependent),
                        {**options, "ONE": one, "SETTLED": settled, "DEPENDENT": dependent}, multiples=even,
                    )  # fmt: skip
                    cases.append(replace(case, wide_loads=part in ("layer", "added")))
            for dependent in (True, False):
                case = CompileCase(
                    f"tile-{name}-{part}{'-dependent' if dependent else ''}", row_product_tile_kernel, signature,
                    replace(_tile_config(width), dependent=dependent), {**options, "DEPENDENT": dependent}, multiples=even,
                )  # fmt: skip
                cases.append(replace(case, tensor_cores=width == 2))
    return cases


COMPILE_CASES = _cases()
