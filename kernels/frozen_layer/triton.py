"""frozen_layer on CUDA: one program a row for norms, one a piece of a row for activations and rotary positions.

Everything here waits for memory, so each kernel reads its rows once: a row of up to `_WIDEST` columns lies in a program's
registers between the sums and the result; longer ones are read again, by then from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import TRITON_TYPES, CompileCase, Config, launch
from ..triton_math import cast, exp_, tanh_
from .reference import ACTIVATIONS, GATED

# ---- device code -----------------------------------------------------------------------------------------------------


@triton.jit
def _row(pointer, col, width):
    """Columns of a row as fp32, 0 beyond its end."""
    return tl.load(pointer + col, mask=col < width, other=0.0).to(tl.float32)


@triton.jit
def frozen_norm_kernel(
    x, added, weight, bias, total, out, stats, width, eps, stride_x, stride_added,
    CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * stride_x
    out += row * width
    col = tl.arange(0, BLOCK)
    if HAS_ADDED:
        total += row * width
        added += row * stride_added
        values = cast(_row(x, col, width) + _row(added, col, width), total.dtype.element_ty)
        tl.store(total + col, values, mask=col < width)
        if not ONE:
            for start in range(BLOCK, width, BLOCK):
                at = start + col
                both = cast(_row(x, at, width) + _row(added, at, width), total.dtype.element_ty)
                tl.store(total + at, both, mask=at < width)
            tl.debug_barrier()  # what a thread stored, any may read below
        values = values.to(tl.float32)
        x = total
    else:
        values = _row(x, col, width)
    mean = tl.sum(values, axis=0)
    if not ONE:
        for start in range(BLOCK, width, BLOCK):
            mean += tl.sum(_row(x, start + col, width), axis=0)
    mean = mean / width if CENTRED else 0.0
    away = tl.where(col < width, values - mean, 0.0)
    square = tl.sum(away * away, axis=0)
    if not ONE:
        for start in range(BLOCK, width, BLOCK):
            away = tl.where(start + col < width, _row(x, start + col, width) - mean, 0.0)
            square += tl.sum(away * away, axis=0)
    scale = 1.0 / tl.sqrt_rn(square / width + eps)
    for start in range(0, width, BLOCK):
        at = start + col
        if not ONE:
            values = _row(x, at, width)
        y = (values - mean) * scale * _row(weight, at, width)
        if HAS_BIAS:
            y += _row(bias, at, width)
        tl.store(out + at, cast(y, out.dtype.element_ty), mask=at < width)
    tl.store(stats + 2 * row, mean)
    tl.store(stats + 2 * row + 1, scale)


@triton.jit
def frozen_norm_bwd_kernel(
    grad, x, stats, weight, added, out, width, stride_grad, stride_x, stride_added,
    CENTRED: tl.constexpr, HAS_ADDED: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    grad += row * stride_grad
    x += row * stride_x
    added += row * stride_added
    out += row * width
    mean, scale = tl.load(stats + 2 * row), tl.load(stats + 2 * row + 1)
    col = tl.arange(0, BLOCK)
    by_unit = _row(grad, col, width) * _row(weight, col, width)
    unit = (_row(x, col, width) - mean) * scale
    along = tl.sum(by_unit * unit, axis=0)
    across = tl.sum(by_unit, axis=0)
    if not ONE:
        for start in range(BLOCK, width, BLOCK):
            at = start + col
            by_unit = _row(grad, at, width) * _row(weight, at, width)
            along += tl.sum(by_unit * (_row(x, at, width) - mean) * scale, axis=0)
            across += tl.sum(by_unit, axis=0)
    along = along / width
    across = across / width if CENTRED else 0.0
    for start in range(0, width, BLOCK):
        at = start + col
        if not ONE:
            by_unit = _row(grad, at, width) * _row(weight, at, width)
            unit = (_row(x, at, width) - mean) * scale
        y = scale * (by_unit - across - unit * along)
        if HAS_ADDED:
            y += _row(added, at, width)
        tl.store(out + at, cast(y, out.dtype.element_ty), mask=at < width)


@triton.jit
def _gelu_parts(x):
    """tanh of GELU's tanh form, and the slope of what it is taken of."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return tanh_(inner), 0.7978845608028654 * (1.0 + 0.134145 * x * x)


@triton.jit
def _sigmoid(x):
    """Its value and its slope, s (1 - s) without the difference, which large x multiply later on."""
    e = exp_(-tl.abs(x))
    inverse = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, e * inverse, inverse), e * inverse * inverse


@triton.jit
def _activated(x, SILU: tl.constexpr):
    """SiLU or GELU of x and its slope."""
    if SILU:
        s, slope = _sigmoid(x)
        y, slope = x * s, s + x * slope
    else:
        t, inner = _gelu_parts(x)
        # Where tanh is +-1 its slope is 0, and the polynomial's may overflow: their product is left out.
        flat = 1.0 - t * t
        y, slope = 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + tl.where(flat == 0.0, 0.0, 0.5 * x * flat * inner)
    return y, slope


@triton.jit
def frozen_activation_kernel(x, out, width, stride_x, GATED: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * stride_x
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y, _ = _activated(_row(x, at, width), SILU)
    if GATED:
        y = y * _row(x + width, at, width)
    tl.store(out + row * width + at, cast(y, out.dtype.element_ty), mask=at < width)


@triton.jit
def frozen_activation_bwd_kernel(
    grad, x, out, width, stride_grad, stride_x, GATED: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x += row * stride_x
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    by_out = _row(grad + row * stride_grad, at, width)
    y, slope = _activated(_row(x, at, width), SILU)
    if GATED:
        out += row * 2 * width
        slope = slope * _row(x + width, at, width)
        tl.store(out + width + at, cast(by_out * y, out.dtype.element_ty), mask=at < width)
    else:
        out += row * width
    tl.store(out + at, cast(by_out * slope, out.dtype.element_ty), mask=at < width)


@triton.jit
def frozen_rotary_kernel(
    x, cos, sin, heads, half, stride_x, stride_cos, stride_sin,
    BACK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    x += row * stride_x
    cos += row * stride_cos
    sin += row * stride_sin
    for start in range(0, half, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        ok = (head < heads)[:, None] & (col < half)[None, :]
        left = x + head[:, None] * (2 * half) + col[None, :]
        cos_l, cos_r = _row(cos, col, half)[None, :], _row(cos + half, col, half)[None, :]
        sin_l, sin_r = _row(sin, col, half)[None, :], _row(sin + half, col, half)[None, :]
        a = tl.load(left, mask=ok, other=0.0).to(tl.float32)
        b = tl.load(left + half, mask=ok, other=0.0).to(tl.float32)
        if BACK:
            first, second = a * cos_l + b * sin_r, b * cos_r - a * sin_l
        else:
            first, second = a * cos_l - b * sin_l, b * cos_r + a * sin_r
        tl.store(left, cast(first, x.dtype.element_ty), mask=ok)
        tl.store(left + half, cast(second, x.dtype.element_ty), mask=ok)


# ---- launchers -------------------------------------------------------------------------------------------------------

_WIDEST = 8192  # columns that one program holds
# The assembler would rather spill than let the widest program have the registers of a whole multiprocessor.
_NORMS = {
    block: Config(
        {"BLOCK": block}, num_warps=max(1, min(16, block // 256)), max_registers=128 if block == _WIDEST else None
    )
    for block in (64, 256, 1024, 2048, 4096, _WIDEST)
}
_ACTIVATION = Config({"BLOCK": 1024}, num_warps=4)
_PAIRS = 1024  # of a program that turns heads
_TURNS = {
    block: Config({"BLOCK_H": max(1, _PAIRS // block), "BLOCK_D": block}, num_warps=4) for block in (16, 32, 64, 128)
}


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 or x.shape[1] < 2 else x.contiguous()


def _norm_config(width: int) -> tuple[Config, bool]:
    """A program's columns, and whether they are all of a row."""
    block = next((size for size in _NORMS if size >= width), _WIDEST)
    return _NORMS[block], width <= block


def frozen_norm(x, weight, bias, eps, centred):
    """The Triton form of lmvae_fast::frozen_norm."""
    return _norm(x, None, weight, bias, eps, centred)[1:]


def frozen_add_norm(x, added, weight, bias, eps, centred):
    """The Triton form of lmvae_fast::frozen_add_norm."""
    return _norm(x, added, weight, bias, eps, centred)


def _norm(x, added, weight, bias, eps, centred):
    rows, width = x.shape
    out, stats = torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty((rows, 2), dtype=torch.float32)
    x, weight, total = _dense_rows(x), weight.contiguous(), None
    if added is not None:
        added, total = _dense_rows(added), torch.empty_like(out)
    config, one = _norm_config(width)
    launch(
        frozen_norm_kernel, (rows,), x.device, config,
        x, x if added is None else added, weight, weight if bias is None else bias.contiguous(),
        out if total is None else total, out, stats, width, eps, x.stride(0), 0 if added is None else added.stride(0),
        CENTRED=centred, HAS_BIAS=bias is not None, HAS_ADDED=added is not None, ONE=one,
    )  # fmt: skip
    return total, out, stats


def frozen_norm_bwd(grad, x, stats, weight, added, centred):
    """The Triton form of lmvae_fast::frozen_norm_bwd."""
    rows, width = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad, x, beside = _dense_rows(grad), _dense_rows(x), _dense_rows(grad if added is None else added)
    config, one = _norm_config(width)
    launch(
        frozen_norm_bwd_kernel, (rows,), x.device, config,
        grad, x, stats.contiguous(), weight.contiguous(), beside, out, width,
        grad.stride(0), x.stride(0), beside.stride(0), CENTRED=centred, HAS_ADDED=added is not None, ONE=one,
    )  # fmt: skip
    return out


def _activation_options(kind: int) -> dict[str, bool]:
    return {"GATED": ACTIVATIONS[kind] in GATED, "SILU": ACTIVATIONS[kind] == "swiglu"}


def _activation_grid(rows: int, width: int) -> tuple[int, int]:
    return rows, triton.cdiv(width, _ACTIVATION.constants["BLOCK"])


def frozen_activation(x, kind):
    """The Triton form of lmvae_fast::frozen_activation."""
    options = _activation_options(kind)
    width = x.shape[1] // 2 if options["GATED"] else x.shape[1]
    out = x.new_empty((x.shape[0], width))
    x = _dense_rows(x)
    launch(
        frozen_activation_kernel, _activation_grid(x.shape[0], width), x.device, _ACTIVATION, x, out, width, x.stride(0),
        **options,
    )  # fmt: skip
    return out


def frozen_activation_bwd(grad, x, kind):
    """The Triton form of lmvae_fast::frozen_activation_bwd."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad, x = _dense_rows(grad), _dense_rows(x)
    launch(
        frozen_activation_bwd_kernel, _activation_grid(*grad.shape), x.device, _ACTIVATION,
        grad, x, out, grad.shape[1], grad.stride(0), x.stride(0), **_activation_options(kind),
    )  # fmt: skip
    return out


def frozen_rotary(x, cos, sin, heads, back):
    """The Triton form of lmvae_fast::frozen_rotary; x has dense rows. Halves of more than 128 columns go in pieces."""
    half = cos.shape[1] // 2
    if not half:
        return
    cos, sin = _dense_rows(cos), _dense_rows(sin)
    config = _TURNS[min(max(16, triton.next_power_of_2(half)), 128)]
    grid = (x.shape[0], triton.cdiv(heads, config.constants["BLOCK_H"]))
    launch(
        frozen_rotary_kernel, grid, x.device, config, x, cos, sin, heads, half, x.stride(0), cos.stride(0), sin.stride(0),
        BACK=back,
    )  # fmt: skip


# ---- compile gate ----------------------------------------------------------------------------------------------------


def _cases() -> list[CompileCase]:
    cases = []
    for dtype in TRITON_TYPES.values():
        io = f"*{dtype}"
        sizes = {"width": "i32", "stride_x": "i32"}
        norm = {
            "x": io, "added": io, "weight": io, "bias": io, "total": io, "out": io, "stats": "*fp32", "eps": "fp32",
            "stride_added": "i32", **sizes,
        }  # fmt: skip
        back = {
            "grad": io, "x": io, "stats": "*fp32", "weight": io, "added": io, "out": io, "stride_grad": "i32",
            "stride_added": "i32", **sizes,
        }  # fmt: skip
        for block, config in _NORMS.items():
            for centred, one in ((True, True), (False, True), (True, False), (False, False)):
                if not one and block != _WIDEST:
                    continue
                tag = f"{dtype}-{block}{'' if one else '-more'}-{'layer' if centred else 'rms'}"
                options = {"CENTRED": centred, "ONE": one}
                wide = one and dtype != "fp32"
                cases += [
                    CompileCase(
                        f"{'add_' if added else ''}norm-{tag}", frozen_norm_kernel, norm, config,
                        {**options, "HAS_BIAS": centred, "HAS_ADDED": added},
                    )
                    for added in (True, False)
                ]  # fmt: skip
                cases += [
                    CompileCase(
                        f"norm_bwd-{tag}-added{int(added)}", frozen_norm_bwd_kernel, back, config,
                        {**options, "HAS_ADDED": added}, wide_loads=wide and block >= 2048,
                    )
                    for added in (True, False)
                ]  # fmt: skip
        for kind, name in enumerate(ACTIVATIONS):
            tag, options = f"{dtype}-{name}", _activation_options(kind)
            forward = {"x": io, "out": io, **sizes}
            cases.append(CompileCase(f"activation-{tag}", frozen_activation_kernel, forward, _ACTIVATION, options))
            backward = {"grad": io, "x": io, "out": io, "stride_grad": "i32", **sizes}
            cases.append(
                CompileCase(f"activation_bwd-{tag}", frozen_activation_bwd_kernel, backward, _ACTIVATION, options)
            )
        turns = {
            "x": io, "cos": io, "sin": io, "heads": "i32", "half": "i32", "stride_x": "i32", "stride_cos": "i32",
            "stride_sin": "i32",
        }  # fmt: skip
        for block, config in _TURNS.items():
            cases += [
                CompileCase(f"rotary-{dtype}-{block}-{'back' if back else 'on'}", frozen_rotary_kernel, turns, config,
                            {"BACK": back})
                for back in (False, True)
            ]  # fmt: skip
    return cases


COMPILE_CASES = _cases()
