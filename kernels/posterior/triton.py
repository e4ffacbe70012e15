"""posterior_sample on CUDA: one program owns some rows, reads mu and logvar once, and makes its own noise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import TRITON_TYPES, CompileCase, Config, launch
from ..triton_math import cast, exp_parts, normal_tile
from . import modes

# ---- device code -----------------------------------------------------------------------------------------------------
# MODE: a number of modes.py.

_DIM_THRESHOLD = tl.constexpr(modes.DIM_THRESHOLD)
_FREE_BITS = tl.constexpr(modes.FREE_BITS)
_SAMPLE_THRESHOLD = tl.constexpr(modes.SAMPLE_THRESHOLD)


@triton.jit
def posterior_fwd_kernel(
    mu, logvar, seed, z, kl, batch, dim, samples, target,
    stride_mu_b, stride_mu_d, stride_lv_b, stride_lv_d,
    MODE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < batch
    key, offset = tl.load(seed), tl.load(seed + 1)
    row_blocks = (dim + 3) // 4
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, dim, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D).to(tl.int64)
        ok = row_ok[:, None] & (col < dim)[None, :]
        m = tl.load(mu + row[:, None] * stride_mu_b + col[None, :] * stride_mu_d, mask=ok, other=0.0).to(tl.float32)
        lv = tl.load(logvar + row[:, None] * stride_lv_b + col[None, :] * stride_lv_d, mask=ok, other=0.0).to(
            tl.float32
        )
        std, _, excess = exp_parts(lv)
        k = 0.5 * (m * m + excess)
        if MODE == _DIM_THRESHOLD:
            k = k * (k > target).to(tl.float32)  # a product, so that Inf and NaN show as in torch
        if MODE == _FREE_BITS:
            k = tl.where(k < target, target, k)
        total += tl.sum(tl.where(ok, k, 0.0), axis=1)
        sample_row = row  # of [samples * batch]: 64-bit, and so is what it is carried into
        for _ in range(samples):
            eps = normal_tile(key, offset, sample_row * row_blocks + start // 4, BLOCK_D // 4)
            value = m + std * eps
            tl.store(z + sample_row[:, None] * dim + col[None, :], cast(value, z.dtype.element_ty), mask=ok)
            sample_row += batch
    if MODE == _SAMPLE_THRESHOLD:
        total = total * (total > target).to(tl.float32)
    tl.store(kl + row, total, mask=row_ok)


@triton.jit
def posterior_bwd_kernel(
    dz, dkl, mu, logvar, kl, seed, dmu, dlogvar, batch, dim, samples, target,
    stride_dz_s, stride_dz_b, stride_dz_d, stride_dkl,
    stride_mu_b, stride_mu_d, stride_lv_b, stride_lv_d,
    HAS_DZ: tl.constexpr, HAS_DKL: tl.constexpr, MODE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < batch
    key, offset = tl.load(seed), tl.load(seed + 1)
    row_blocks = (dim + 3) // 4
    for start in range(0, dim, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D).to(tl.int64)
        ok = row_ok[:, None] & (col < dim)[None, :]
        lv = tl.load(logvar + row[:, None] * stride_lv_b + col[None, :] * stride_lv_d, mask=ok, other=0.0).to(
            tl.float32
        )
        std, minus1, excess = exp_parts(lv)
        dm = tl.zeros((ROWS, BLOCK_D), tl.float32)
        dl = tl.zeros((ROWS, BLOCK_D), tl.float32)
        if HAS_DZ:
            sample_row = row
            at = dz + row[:, None] * stride_dz_b + col[None, :] * stride_dz_d
            for _ in range(samples):
                g = tl.load(at, mask=ok, other=0.0).to(tl.float32)
                eps = normal_tile(key, offset, sample_row * row_blocks + start // 4, BLOCK_D // 4)
                dm += g
                dl += g * eps
                sample_row += batch
                at += stride_dz_s
            dl = dl * (0.5 * std)
        if HAS_DKL:
            m = tl.load(mu + row[:, None] * stride_mu_b + col[None, :] * stride_mu_d, mask=ok, other=0.0).to(tl.float32)
            g = tl.load(dkl + row * stride_dkl, mask=row_ok, other=0.0)
            if MODE == _SAMPLE_THRESHOLD:
                g = g * (tl.load(kl + row, mask=row_ok, other=0.0) > target).to(tl.float32)
            gk = g[:, None] + tl.zeros_like(m)
            if MODE == _DIM_THRESHOLD:
                gk = gk * (0.5 * (m * m + excess) > target).to(tl.float32)
            if MODE == _FREE_BITS:
                gk = gk * (0.5 * (m * m + excess) >= target).to(tl.float32)
            dm += gk * m
            dl += 0.5 * gk * minus1
        out = row[:, None] * dim + col[None, :]
        tl.store(dmu + out, cast(dm, dmu.dtype.element_ty), mask=ok)
        tl.store(dlogvar + out, cast(dl, dlogvar.dtype.element_ty), mask=ok)


# ---- configurations and launchers ------------------------------------------------------------------------------------

# Rows and columns of a program, by the smallest power of two that holds a row: 512 elements, four per thread (with eight,
# the 64-bit addresses of the narrow shapes spill on sm_80); 1024 for long rows, whose addresses are cheap.
_CONFIGS = {
    block: Config({"ROWS": max(1, 512 // block), "BLOCK_D": block}, num_warps=4)
    for block in (16, 32, 64, 128, 256, 512, 1024)
}


def _config(dim: int) -> Config:
    return _CONFIGS[min(1024, max(16, triton.next_power_of_2(dim)))]


def _strides(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.stride())


def posterior_fwd(mu, logvar, seed, num_samples, mode, target):
    """The Triton form of lmvae_fast::posterior_fwd."""
    batch, dim = mu.shape
    z = torch.empty((batch, dim) if num_samples == 1 else (num_samples, batch, dim), dtype=mu.dtype, device=mu.device)
    kl = torch.empty(batch, dtype=torch.float32, device=mu.device)
    config = _config(dim)
    grid = (triton.cdiv(batch, config.constants["ROWS"]),)
    launch(
        posterior_fwd_kernel, grid, mu.device, config,
        mu, logvar, seed, z, kl, batch, dim, num_samples, target, *_strides(mu), *_strides(logvar), MODE=mode,
    )  # fmt: skip
    return z, kl


def posterior_bwd(dz, dkl, mu, logvar, kl, seed, num_samples, mode, target):
    """The Triton form of lmvae_fast::posterior_bwd. dz, dkl: None where that output was not used."""
    batch, dim = mu.shape
    dmu, dlogvar = (torch.empty((batch, dim), dtype=mu.dtype, device=mu.device) for _ in range(2))
    config = _config(dim)
    grid = (triton.cdiv(batch, config.constants["ROWS"]),)
    dz_strides = (0, 0, 0) if dz is None else (0, *_strides(dz)) if num_samples == 1 else _strides(dz)
    launch(
        posterior_bwd_kernel, grid, mu.device, config,
        mu if dz is None else dz, kl if dkl is None else dkl, mu, logvar, kl, seed, dmu, dlogvar,
        batch, dim, num_samples, target, *dz_strides, 0 if dkl is None else dkl.stride(0), *_strides(mu), *_strides(logvar),
        HAS_DZ=dz is not None, HAS_DKL=dkl is not None, MODE=mode,
    )  # fmt: skip
    return dmu, dlogvar


# ---- compile gate ----------------------------------------------------------------------------------------------------


def _cases() -> list[CompileCase]:
    cases = []
    sizes = {"batch": "i32", "dim": "i32", "samples": "i32", "target": "fp32"}
    strides = {"stride_mu_b": "i32", "stride_mu_d": 1, "stride_lv_b": "i32", "stride_lv_d": 1}
    grads = {"stride_dz_s": "i32", "stride_dz_b": "i32", "stride_dz_d": 1, "stride_dkl": "i32"}
    for dtype in TRITON_TYPES.values():
        io = {"mu": f"*{dtype}", "logvar": f"*{dtype}", "seed": "*i64", "kl": "*fp32", **sizes, **strides}
        for block, config in _CONFIGS.items():
            for mode in range(len(modes.KL_MODES)) if block == 128 and dtype == "fp32" else (modes.SUM,):
                tag = f"{dtype}-{block}-mode{mode}"
                fwd = {**io, "z": f"*{dtype}"}
                cases.append(CompileCase(f"fwd-{tag}", posterior_fwd_kernel, fwd, config, {"MODE": mode}))
                bwd = {**io, **grads, "dz": f"*{dtype}", "dkl": "*fp32", "dmu": f"*{dtype}", "dlogvar": f"*{dtype}"}
                for has_dz, has_dkl in ((1, 1), (1, 0), (0, 1)) if block == 128 and dtype == "fp32" else ((1, 1),):
                    used = {"MODE": mode, "HAS_DZ": bool(has_dz), "HAS_DKL": bool(has_dkl)}
                    name = f"bwd-{tag}-dz{has_dz}-dkl{has_dkl}"
                    cases.append(CompileCase(name, posterior_bwd_kernel, bwd, config, used))
    return cases


COMPILE_CASES = _cases()
