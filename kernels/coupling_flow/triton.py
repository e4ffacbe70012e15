"""coupling_flow on CUDA: a program takes its rows through a whole table of instructions (program.py), in one launch.

Forward and inverse are one launch. Backward is two per stage: the rows kernel (the state rebuilt where it was not kept, and
everything that belongs to a row), then the sums over the batch (weights, biases, scales), each tile of which belongs to one
program: deterministic, and the temporary memory does not grow with depth. Rows live in scratch memory that a program
writes and reads back itself, which on a GPU means in its second-level cache.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .. import backend
from ..launch import TRITON_TYPES, CompileCase, Config, launch
from ..triton_math import exp_
from . import program as P
from .reference import _SCALE
from .spec import SCALES

# ---- elementary functions --------------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    """Cephes' tanhf: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    near = p * z * x + x
    far = 1.0 - 2.0 / (exp_(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


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
    t = _tanh(tl.where(kind == 3, 0.5 * raw, raw))
    return tl.where(kind == 2, 0.636 * _atan(raw), t)


@triton.jit
def _squash_slope(kind, raw):
    t = _tanh(tl.where(kind == 3, 0.5 * raw, raw))
    slope = (1.0 - t * t) * tl.where(kind == 3, 0.5, 1.0)
    return tl.where(kind == 2, 0.636 / (1.0 + raw * raw), slope)


@triton.jit
def _activate(kind, x):
    gelu = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return tl.where(kind == 2, gelu, x / (1.0 + exp_(-x)))


@triton.jit
def _activation_slope(kind, x):
    gelu = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * exp_(-0.5 * x * x) * 0.3989422804014327
    sigmoid = 1.0 / (1.0 + exp_(-x))
    silu = sigmoid * (1.0 + x * (1.0 - sigmoid))
    return tl.where(kind == 1, tl.where(x <= 0.0, 0.0, 1.0), tl.where(kind == 2, gelu, silu))


# ---- instructions ----------------------------------------------------------------------------------------------------


@triton.jit
def _rows_of(temporary, kept, words, batch, rows):
    """Pointers [ROWS, 1] to the first column of a matrix's rows; words: memory, start, columns of a row, column."""
    start, width, column = tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    offsets = start * batch + rows * width + column
    if tl.load(words) == 0:
        at = temporary + offsets[:, None]
    else:
        at = kept + offsets[:, None]
    return at


@triton.jit
def _dense(
    a, c, word, theta, constants, row_ok,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    width, inner, weight, bias, packed = (
        tl.load(word + 9), tl.load(word + 10), tl.load(word + 11), tl.load(word + 12), tl.load(word + 13)
    )  # fmt: skip
    flags, ld = packed % 32, packed // 32
    step_k = tl.where((flags & 8) != 0, 1, ld)
    step_n = tl.where((flags & 8) != 0, ld, 1)
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
            if (flags & 16) == 0:
                w = tl.load(theta + at, mask=w_ok, other=0.0)
            else:
                w = tl.load(constants + at, mask=w_ok, other=0.0)
            acc = tl.dot(x.to(DOT), w.to(DOT), acc, input_precision="ieee")
        ok = row_ok[:, None] & n_ok[None, :]
        if (flags & 1) != 0:
            acc += tl.load(theta + bias + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        if (flags & 2) != 0:
            acc += tl.load(c + n[None, :], mask=ok, other=0.0)
        if (flags & 4) != 0:
            acc = tl.where(acc < 0.0, 0.0, acc)
        tl.store(c + n[None, :], acc, mask=ok)


@triton.jit
def _couple(a, c, raw_s, word, clamp, gain, logdet, rows, row_ok, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    width, flags = tl.load(word + 9), tl.load(word + 13)
    kind, inverse = flags % 8, (flags & 8) != 0
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
    if (flags & 16) != 0:
        tl.store(logdet + rows, tl.load(logdet + rows, mask=row_ok, other=0.0) + total, mask=row_ok)


@triton.jit
def _map(a, c, word, theta, scales, indices, row_ok, BLOCK: tl.constexpr):
    width, index, mode = tl.load(word + 9), tl.load(word + 10), tl.load(word + 11)
    prepared, offset = tl.load(word + 12), tl.load(word + 13)
    for n0 in range(0, width, BLOCK):
        n = n0 + tl.arange(0, BLOCK).to(tl.int64)
        n_ok = n < width
        source = n
        if index >= 0:
            source = tl.load(indices + index + n, mask=n_ok, other=0).to(tl.int64)
        ok = row_ok[:, None] & n_ok[None, :]
        y = tl.load(a + source[None, :], mask=ok, other=0.0)
        if mode != 0:  # 1: y = x * scale + offset of the source channel; 2: y = (x - offset) / scale of the target's
            channel = tl.where(mode == 2, n, source)
            scale = tl.load(scales + prepared + channel, mask=n_ok, other=1.0)[None, :]
            add = tl.load(theta + offset + channel, mask=n_ok, other=0.0).to(tl.float32)[None, :]
            y = tl.where(mode == 1, y * scale + add, (y - add) / scale)
        tl.store(c + n[None, :], y, mask=ok)


@triton.jit
def _affine_grad(g, through, u, word, scales, row_ok, BLOCK: tl.constexpr):
    width, prepared, inverse = tl.load(word + 9), tl.load(word + 11), tl.load(word + 12) != 0
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
    width, flags = tl.load(word + 9), tl.load(word + 14)
    kind, inverse = flags % 8, (flags & 8) != 0
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
    width, kind = tl.load(word + 9), tl.load(word + 10)
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
        a = _rows_of(temporary, kept, word + 1, size, rows)
        c = _rows_of(temporary, kept, word + 5, size, rows)
        if op == 0:
            _dense(a, c, word, theta, constants, row_ok, ROWS, BLOCK_N, BLOCK_K, DOT)
        elif op == 1:
            _activation(a, c, word, row_ok, False, BLOCK)
        elif op == 2:
            _activation(a, c, word, row_ok, True, BLOCK)
        elif op == 3:
            raw = _raw_rows(temporary, kept, word + 10, size, rows)
            _couple(a, c, raw, word, clamp, gain, logdet, rows, row_ok, ROWS, BLOCK)
        elif op == 4:
            _map(a, c, word, theta, scales, indices, row_ok, BLOCK)
        elif op == 6:
            u = temporary + (tl.load(word + 10) * size + rows * tl.load(word + 9))[:, None]
            _affine_grad(a, c, u, word, scales, row_ok, BLOCK)
        elif op == 7:
            raw = _raw_rows(temporary, kept, word + 10, size, rows)
            d_raw = temporary + (tl.load(word + 13) * size + rows * tl.load(word + 12))[:, None]
            _couple_grad(a, c, raw, d_raw, word, clamp, gain, logdet, rows, row_ok, BLOCK)
        tl.debug_barrier()  # what this instruction wrote, the next one reads through other threads


@triton.jit
def _raw_rows(temporary, kept, words, batch, rows):
    """As _rows_of, for a matrix without a column word: memory, start, columns of a row."""
    offsets = tl.load(words + 1) * batch + rows * tl.load(words + 2)
    if tl.load(words) == 0:
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
    m0, n0, width_m, width_n = tl.load(word + 8), tl.load(word + 9), tl.load(word + 10), tl.load(word + 11)
    out, bias = tl.load(word + 12), tl.load(word + 13)
    m, n = m0 + tl.arange(0, TILE), n0 + tl.arange(0, TILE)
    m_ok, n_ok = m < width_m, n < width_n
    size = tl.full((), 0, tl.int64) + batch
    acc = tl.zeros((TILE, TILE), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for first in range(0, batch, CHUNK):
        rows = first + tl.arange(0, CHUNK).to(tl.int64)
        row_ok = rows < batch
        a = _rows_of(temporary, kept, word, size, rows)
        g = _rows_of(temporary, kept, word + 4, size, rows)
        x = tl.load(a + m[None, :], mask=row_ok[:, None] & m_ok[None, :], other=0.0)
        d = tl.load(g + n[None, :], mask=row_ok[:, None] & n_ok[None, :], other=0.0)
        acc = tl.dot(tl.trans(x).to(DOT), d.to(DOT), acc, input_precision="ieee")
        total += tl.sum(d, axis=0)
    tl.store(grad_theta + out + m[:, None] * width_n + n[None, :], acc, mask=m_ok[:, None] & n_ok[None, :])
    if bias >= 0:
        tl.store(grad_theta + bias + n, total, mask=n_ok)


# ---- launchers -------------------------------------------------------------------------------------------------------

# A wider BLOCK_N, or eight warps, spills in one architecture or another (the dispatch on the opcode holds registers).
_ROWS = Config({"ROWS": 32, "BLOCK": 32, "BLOCK_N": 32, "BLOCK_K": 32, "FIELDS": P.FIELDS}, num_warps=4)
_SUMS = Config({"TILE": P.TILE, "CHUNK": 32, "FIELDS": P.SUM_FIELDS}, num_warps=8)


def _dot_type(theta: torch.Tensor):
    """What tl.dot multiplies: tensor cores take the half types as they are; the interpreter computes bf16 wrongly."""
    if backend.INTERPRET:
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(theta.dtype, tl.float32)


@lru_cache(maxsize=256)
def _table(values: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # One upload per flow, direction and device; later calls (and CUDA graphs, after a warm-up call) find it there.
    return torch.tensor(values or (0,), dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _affine_places(ints: tuple, floats: tuple) -> tuple[tuple[int, ...], ...]:
    """For each kind of scale: (places of its raw parameters in theta, their places among the prepared scales)."""
    dim, found = ints[0], []
    for kind in range(1, len(SCALES) + 1):
        stages = [s for s in P.read_plan(ints, floats) if s.affine == kind]
        found.append(tuple(s.scale + c for s in stages for c in range(dim)))
        found.append(tuple(s.prepared + c for s in stages for c in range(dim)))
    return tuple(found)


def _scales(ints: tuple, floats: tuple, theta: torch.Tensor, constants: torch.Tensor):
    """(scales, d scale / d raw, places in theta, the part of the log-determinant that is every row's)."""
    places = _affine_places(ints, floats)
    stages = P.read_plan(ints, floats)
    size = sum(ints[0] for s in stages if s.affine)
    scales = torch.empty(max(1, size), dtype=torch.float32, device=theta.device)
    slopes, where = torch.empty_like(scales), torch.empty(max(1, size), dtype=torch.int64, device=theta.device)
    for kind, name in enumerate(SCALES):
        raw_at, at = places[2 * kind], places[2 * kind + 1]
        if not at:
            continue
        raw_at, at = (_table(p, torch.int64, theta.device) for p in (raw_at, at))
        raw = theta.index_select(0, raw_at).float()
        value = _SCALE[name](raw)
        scales.index_copy_(0, at, value)
        slope = {"softplus": 0.1 * torch.sigmoid(0.5 * raw), "exp": value, "sigmoid": value * (1 - value / 10)}[name]
        slopes.index_copy_(0, at, slope)
        where.index_copy_(0, at, raw_at)
    offset = scales[:size].log().sum()
    dim = ints[0]
    soft = tuple(s.matrix + 2 * dim * dim for s in stages if s.permutation == 2)
    if soft:
        offset = offset + constants.index_select(0, _table(soft, torch.int64, theta.device)).float().sum()
    return scales, slopes[:size], where[:size], offset


def _place(memory: torch.Tensor, matrix: P.Matrix, batch: int) -> torch.Tensor:
    return memory[matrix.start * batch : (matrix.start + matrix.row) * batch].view(batch, matrix.row)


def _run_rows(program: P.Program, temporary, kept, theta, constants, indices, scales, logdet, batch: int) -> None:
    device = theta.device
    launch(
        coupling_flow_rows_kernel, (triton.cdiv(batch, _ROWS.constants["ROWS"]),), device, _ROWS,
        _table(program.words, torch.int64, device), _table(program.reals, torch.float32, device),
        len(program.words) // P.FIELDS, temporary, kept, theta, constants if constants.numel() else theta, indices, scales,
        logdet, batch, DOT=_dot_type(theta),
    )  # fmt: skip


def coupling_flow_fwd(x, cond, theta, constants, indices, ints, floats, inverse, keep):
    """The Triton form of lmvae_fast::coupling_flow_fwd."""
    batch = x.shape[0]
    save = keep == 1
    ints, floats = tuple(ints), tuple(floats)
    program = P.forward_program(ints, floats, inverse, save)
    theta, constants = theta.contiguous(), constants.contiguous()
    temporary = torch.empty(max(1, batch * program.temporary), dtype=torch.float32, device=x.device)
    saved = torch.empty(batch * program.kept, dtype=torch.float32, device=x.device)
    scales, _, _, offset = _scales(ints, floats, theta, constants)
    logdet = (-offset if inverse else offset).expand(batch).contiguous()
    logdet = logdet.clone() if logdet.data_ptr() == offset.data_ptr() else logdet
    _place(temporary, program.places["x"], batch).copy_(x)
    if cond is not None and "cond" in program.places:
        _place(temporary, program.places["cond"], batch).copy_(cond)
    if batch:
        kept = saved if saved.numel() else temporary
        _run_rows(program, temporary, kept, theta, constants, indices, scales, logdet, batch)
    y = _place(temporary, program.places["y"], batch)
    if keep == 2 and x.dtype != torch.float32:
        saved = y.reshape(-1).clone()
    return y.to(x.dtype, copy=True), logdet, saved


def coupling_flow_bwd(dy, dlogdet, y, saved, cond, theta, constants, indices, ints, floats, inverse, batch, want_cond):
    """The Triton form of lmvae_fast::coupling_flow_bwd."""
    ints, floats = tuple(ints), tuple(floats)
    dim, cond_dim, device = ints[0], ints[1], theta.device
    recompute = y is not None
    programs = P.backward_programs(ints, floats, inverse, not recompute)
    theta, constants = theta.contiguous(), constants.contiguous()
    scales, slopes, where, _ = _scales(ints, floats, theta, constants)
    temporary = torch.empty(max(1, batch * programs[0].temporary), dtype=torch.float32, device=device)
    grad_theta = torch.zeros(theta.numel(), dtype=torch.float32, device=device)
    d_logdet = (
        torch.zeros(batch, dtype=torch.float32, device=device) if dlogdet is None else dlogdet.float().contiguous()
    )
    first = programs[0].places
    g = _place(temporary, first["g"], batch)
    if dy is None:
        g.zero_()
    else:
        g.copy_(dy)
    if recompute:
        start = saved.view(batch, dim) if saved.numel() else y
        _place(temporary, first["here"], batch).copy_(start)
    if cond_dim:
        _place(temporary, first["cond"], batch).copy_(cond)
        _place(temporary, first["d_cond"], batch).zero_()
    if batch:
        kept = saved if not recompute and saved.numel() else temporary
        for program in programs:
            _run_rows(program, temporary, kept, theta, constants, indices, scales, d_logdet, batch)
            if program.sums:
                launch(
                    coupling_flow_sums_kernel, (len(program.sums) // P.SUM_FIELDS,), device, _SUMS,
                    _table(program.sums, torch.int64, device), temporary, kept, grad_theta, batch, DOT=_dot_type(theta),
                )  # fmt: skip
    if where.numel():
        total = d_logdet.sum() * (-1 if inverse else 1)
        grad_scale = grad_theta.index_select(0, where)
        grad_theta.index_copy_(0, where, (grad_scale + total / scales[: where.numel()]) * slopes)
    dx = _place(temporary, programs[-1].places["g_out"], batch).to(theta.dtype, copy=True)
    dcond = theta.new_empty(0)
    if want_cond:
        dcond = _place(temporary, first["d_cond"], batch).to(theta.dtype, copy=True)
    return dx, dcond, grad_theta.to(theta.dtype)


# ---- compile gate ----------------------------------------------------------------------------------------------------


def _cases() -> list[CompileCase]:
    cases = []
    for dtype in TRITON_TYPES.values():
        dot = {"fp16": tl.float16, "bf16": tl.bfloat16}.get(dtype, tl.float32)
        rows = {
            "code": "*i64", "reals": "*fp32", "count": "i32", "temporary": "*fp32", "kept": "*fp32", "theta": f"*{dtype}",
            "constants": f"*{dtype}", "indices": "*i32", "scales": "*fp32", "logdet": "*fp32", "batch": "i32",
        }  # fmt: skip
        sums = {"jobs": "*i64", "temporary": "*fp32", "kept": "*fp32", "grad_theta": "*fp32", "batch": "i32"}
        half = dtype != "fp32"
        cases.append(
            CompileCase(f"rows-{dtype}", coupling_flow_rows_kernel, rows, _ROWS, {"DOT": dot}, tensor_cores=half)
        )
        cases.append(
            CompileCase(f"sums-{dtype}", coupling_flow_sums_kernel, sums, _SUMS, {"DOT": dot}, tensor_cores=half)
        )
    return cases


COMPILE_CASES = _cases()
