"""coupling_flow on CUDA: a program takes its rows through a whole table of instructions (program.py), in one launch.

Forward and inverse are one launch. Backward is two per stage: the rows kernel (the state rebuilt where it was not kept, and
everything that belongs to a row), then the sums over the batch (weights, biases, scales), each tile of which belongs to one
program: deterministic, and the temporary memory does not grow with depth. Rows live in scratch memory that a program
writes and reads back itself, which on a GPU means in its second-level cache.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
import triton
import triton.language as tl

from .. import backend
from ..launch import TRITON_TYPES, CompileCase, Config, launch
from . import program as P
from .codes import FIELDS, KEEP_ACTIVATIONS, KEEP_OUTPUT, SUM_FIELDS, TILE, Permutation, Scale, names
from .plan import read_plan
from .reference import _SCALE
from .triton_kernels import coupling_flow_rows_kernel, coupling_flow_sums_kernel

# ---- launchers -------------------------------------------------------------------------------------------------------

# A wider BLOCK_N, or eight warps, spills in one architecture or another (the dispatch on the opcode holds registers).
_ROWS = Config(
    {"ROWS": 32, "BLOCK": 32, "BLOCK_N": 32, "BLOCK_K": 32, "FIELDS": FIELDS}, num_warps=4, max_registers=255
)
_SUMS = Config({"TILE": TILE, "CHUNK": 32, "FIELDS": SUM_FIELDS}, num_warps=8)


def _dot_type(theta: torch.Tensor):
    """What tl.dot multiplies: tensor cores take the half types as they are; the interpreter computes bf16 wrongly."""
    if backend.INTERPRET:
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(theta.dtype, tl.float32)


@cache
def _table(values: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An upload, once per flow, direction and device, and kept for good: captured CUDA graphs read it at every replay."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "coupling_flow: this flow's tables are not on the device yet, and a copy from the host cannot be captured in a "
            "CUDA graph; run the same forward (and backward) once before capturing, at any batch size"
        )
    return torch.tensor(values or (0,), dtype=dtype, device=device)


def _tables(program: P.Program, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """words int64, reals fp32 and sums int64 of a program. Kept with it: thousands of integers are slow to hash each call."""
    if device not in program.uploaded:
        kinds = ((program.words, torch.int64), (program.reals, torch.float32), (program.sums, torch.int64))
        program.uploaded[device] = tuple(_table(values, dtype, device) for values, dtype in kinds)
    return program.uploaded[device]


@lru_cache(maxsize=64)
def _affine_places(ints: tuple, floats: tuple) -> tuple[tuple[int, ...], ...]:
    """For each kind of scale: (places of its raw parameters in theta, their places among the prepared scales)."""
    dim, found = ints[0], []
    for kind in Scale:
        stages = [s for s in read_plan(ints, floats) if s.affine == kind]
        found.append(tuple(s.scale + c for s in stages for c in range(dim)))
        found.append(tuple(s.prepared + c for s in stages for c in range(dim)))
    return tuple(found)


def _scales(ints: tuple, floats: tuple, theta: torch.Tensor, constants: torch.Tensor):
    """(scales, d scale / d raw, places in theta, the part of the log-determinant that is every row's)."""
    places = _affine_places(ints, floats)
    stages = read_plan(ints, floats)
    size = sum(ints[0] for s in stages if s.affine)
    scales = torch.empty(max(1, size), dtype=torch.float32, device=theta.device)
    slopes, where = torch.empty_like(scales), torch.empty(max(1, size), dtype=torch.int64, device=theta.device)
    for kind, name in enumerate(names(Scale)):
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
    soft = tuple(s.matrix + 2 * dim * dim for s in stages if s.permutation == Permutation.SOFT)
    if soft:
        offset = offset + constants.index_select(0, _table(soft, torch.int64, theta.device)).float().sum()
    return scales, slopes[:size], where[:size], offset


def _place(memory: torch.Tensor, matrix: P.Matrix, batch: int) -> torch.Tensor:
    return memory[matrix.start * batch : (matrix.start + matrix.row) * batch].view(batch, matrix.row)


def _run_rows(program: P.Program, temporary, kept, theta, constants, indices, scales, logdet, batch: int) -> None:
    device = theta.device
    words, reals, _ = _tables(program, device)
    launch(
        coupling_flow_rows_kernel, (triton.cdiv(batch, _ROWS.constants["ROWS"]),), device, _ROWS,
        words, reals, len(program.words) // FIELDS, temporary, kept,
        theta, constants if constants.numel() else theta, indices, scales, logdet, batch, DOT=_dot_type(theta),
    )  # fmt: skip


def coupling_flow_fwd(x, cond, theta, constants, indices, ints, floats, inverse, keep):
    """The Triton form of lmvae_fast::coupling_flow_fwd."""
    batch = x.shape[0]
    save = keep == KEEP_ACTIVATIONS
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
    if keep == KEEP_OUTPUT and x.dtype != torch.float32:
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
                    coupling_flow_sums_kernel, (len(program.sums) // SUM_FIELDS,), device, _SUMS,
                    _tables(program, device)[2], temporary, kept, grad_theta, batch, DOT=_dot_type(theta),
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
