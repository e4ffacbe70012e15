"""Launchers of aggregate_logpdf's Triton kernels, their configurations, and what the compile gate builds."""

from __future__ import annotations

import torch
import triton

from ..launch import TRITON_TYPES, CompileCase, Config, launch
from .checks import check_offsets
from .triton_kernels import (
    aggregate_bwd_posterior_kernel,
    aggregate_bwd_z_kernel,
    aggregate_fwd_kernel,
    aggregate_prepare_kernel,
)

# By the power of two that holds a row: marginal densities are cut into blocks of at most 128 columns, a joint one holds the
# row whole. A program has 1024 elements of z, or 512 of posteriors, which are fewer and each meet many rows; joint densities
# keep 1024 there too, since the sum over a row must come out as it did forward, in the same order.
_WIDEST_MARGINAL, _WIDEST_JOINT = 128, 2048


def _config(block_d: int, elements: int, registers: int = 168) -> Config:
    rows = max(1, elements // block_d)
    warps = 4 if rows * block_d <= 1024 else 8
    return Config({"ROWS": rows, "BLOCK_D": block_d}, num_warps=warps, max_registers=registers)


_ROWS = {block: _config(block, 1024) for block in (16, 32, 64, 128, 256, 512, 1024, 2048)}
_ROWS[64] = _config(64, 1024, 192)  # of 64 half-precision columns Triton 3.6 would spill four numbers
_PREPARE = {block: _config(block, 256) for block in (16, 32, 64, 128)}
_POSTERIORS = {block: _config(block, 512) for block in (16, 32, 64, 128)}


def _block(dim: int, per_dim: bool) -> int:
    return min(_WIDEST_MARGINAL if per_dim else _WIDEST_JOINT, max(16, triton.next_power_of_2(dim)))


def _groups(cu_z, cu_posteriors, z, mu):
    """Offsets (anything where there are none), the number of groups, the steps of a bisection, HAS_GROUPS."""
    if cu_z is None:
        return mu, mu, 0, 0, False
    if not mu.is_cuda:
        check_offsets(cu_z, cu_posteriors, z.shape[1], mu.shape[0], mu.device)
    groups = cu_z.numel() - 1
    return cu_z.contiguous(), cu_posteriors.contiguous(), groups, groups.bit_length(), True


def _prepared(logvar, min_var: float, backward: bool):
    """1 / sqrt(2 e^logvar + min_var) [N, D], and for a backward pass 2 e^logvar / (2 e^logvar + min_var) [N, D]."""
    posteriors, dim = logvar.shape
    root = torch.empty((posteriors, dim), dtype=torch.float32, device=logvar.device)
    ratio = torch.empty_like(root) if backward else root
    config = _PREPARE[_block(dim, True)]
    grid = (triton.cdiv(posteriors, config.constants["ROWS"]), triton.cdiv(dim, config.constants["BLOCK_D"]))
    launch(
        aggregate_prepare_kernel, grid, logvar.device, config,
        logvar, root, ratio, posteriors, dim, min_var, *logvar.stride(), HAS_RATIO=backward,
    )  # fmt: skip
    return root, ratio


def aggregate_logpdf_fwd(z, mu, logvar, cu_z, cu_posteriors, per_dim, min_var):
    """The Triton form of lmvae_fast::aggregate_logpdf_fwd."""
    (samples, rows, dim), posteriors = z.shape, mu.shape[0]
    shape = (samples, rows, dim) if per_dim else (samples, rows)
    logq, lse = (torch.empty(shape, dtype=torch.float32, device=z.device) for _ in range(2))
    config = _ROWS[_block(dim, per_dim)]
    blocks = triton.cdiv(rows, config.constants["ROWS"])
    cu_z, cu_posteriors, groups, steps, has_groups = _groups(cu_z, cu_posteriors, z, mu)
    root, _ = _prepared(logvar, min_var, backward=False)
    launch(
        aggregate_fwd_kernel, (samples * blocks, triton.cdiv(dim, config.constants["BLOCK_D"])), z.device, config,
        z, mu, logvar, root, cu_z, cu_posteriors, logq, lse, rows, posteriors, dim, groups, steps, blocks,
        *z.stride(), *mu.stride(), *logvar.stride(), HAS_GROUPS=has_groups, PER_DIM=per_dim,
    )  # fmt: skip
    return logq, lse


def aggregate_logpdf_bwd(grad, lse, z, mu, logvar, cu_z, cu_posteriors, per_dim, min_var, need_z, need_posteriors):
    """The Triton form of lmvae_fast::aggregate_logpdf_bwd."""
    (samples, rows, dim), posteriors = z.shape, mu.shape[0]
    dz = torch.empty((samples, rows, dim) if need_z else (0,), dtype=z.dtype, device=z.device)
    shape = (posteriors, dim) if need_posteriors else (0,)
    dmu, dlogvar = (torch.empty(shape, dtype=mu.dtype, device=mu.device) for _ in range(2))
    cu_z, cu_posteriors, groups, steps, has_groups = _groups(cu_z, cu_posteriors, z, mu)
    root, ratio = _prepared(logvar, min_var, backward=True)
    strides = (*grad.stride(), *(() if per_dim else (1,)), *z.stride(), *mu.stride(), *logvar.stride())
    if need_z:
        config = _ROWS[_block(dim, per_dim)]
        blocks = triton.cdiv(rows, config.constants["ROWS"])
        launch(
            aggregate_bwd_z_kernel, (samples * blocks, triton.cdiv(dim, config.constants["BLOCK_D"])), z.device, config,
            grad, lse, z, mu, logvar, root, cu_z, cu_posteriors, dz, rows, posteriors, dim, groups, steps, blocks,
            *strides, HAS_GROUPS=has_groups, PER_DIM=per_dim,
        )  # fmt: skip
    if need_posteriors:
        config = (_POSTERIORS if per_dim else _ROWS)[_block(dim, per_dim)]
        grid = (triton.cdiv(posteriors, config.constants["ROWS"]), triton.cdiv(dim, config.constants["BLOCK_D"]))
        launch(
            aggregate_bwd_posterior_kernel, grid, z.device, config,
            grad, lse, z, mu, logvar, root, ratio, cu_z, cu_posteriors, dmu, dlogvar, samples, rows, posteriors, dim,
            groups, steps, *strides, HAS_GROUPS=has_groups, PER_DIM=per_dim,
        )  # fmt: skip
    return dz, dmu, dlogvar


# ---- compile gate ----------------------------------------------------------------------------------------------------


def _cases() -> list[CompileCase]:
    cases = []
    sizes = dict.fromkeys(("rows", "posteriors", "dim", "groups", "steps"), "i32")
    strides = {
        "stride_z_s": "i32", "stride_z_k": "i32", "stride_z_d": 1, "stride_mu_n": "i32", "stride_mu_d": 1,
        "stride_lv_n": "i32", "stride_lv_d": 1,
    }  # fmt: skip
    for dtype in TRITON_TYPES.values():
        io = dict.fromkeys(("z", "mu", "logvar"), f"*{dtype}")
        io |= {"cu_z": "*i32", "cu_posteriors": "*i32", "lse": "*fp32", "root": "*fp32", **sizes, **strides}
        prepare = {name: io[name] for name in ("logvar", "root", "posteriors", "dim", "stride_lv_n", "stride_lv_d")}
        cases += [
            CompileCase(
                f"prepare-{dtype}-{block}", aggregate_prepare_kernel, {**prepare, "ratio": "*fp32", "min_var": "fp32"}, config,
                {"HAS_RATIO": True},
            )
            for block, config in _PREPARE.items()
        ]  # fmt: skip
        for block in _ROWS:
            for per_dim in (True, False):
                if block > (_WIDEST_MARGINAL if per_dim else _WIDEST_JOINT):
                    continue
                grads = {
                    "grad": "*fp32",
                    "stride_g_s": "i32",
                    "stride_g_k": "i32",
                    "stride_g_d": 1,
                }
                tag = f"{dtype}-{block}-{'marginal' if per_dim else 'joint'}"
                chosen = {"HAS_GROUPS": True, "PER_DIM": per_dim}
                rows = {**io, "blocks": "i32"}
                cases += [
                    CompileCase(
                        f"fwd-{tag}", aggregate_fwd_kernel, {**rows, "logq": "*fp32"}, _ROWS[block], chosen
                    ),
                    CompileCase(
                        f"bwd-z-{tag}", aggregate_bwd_z_kernel, {**rows, **grads, "dz": f"*{dtype}"}, _ROWS[block], chosen
                    ),
                    CompileCase(
                        f"bwd-posterior-{tag}", aggregate_bwd_posterior_kernel,
                        {**io, **grads, "ratio": "*fp32", "dmu": f"*{dtype}", "dlogvar": f"*{dtype}", "samples": "i32"},
                        (_POSTERIORS if per_dim else _ROWS)[block], chosen,
                    ),
                ]  # fmt: skip
    return cases


COMPILE_CASES = _cases()
