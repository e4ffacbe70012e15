"""Launchers of latent_kv's Triton kernels, their configurations, and what the compile gate builds.

Sums over splits are made by torch in a fixed order: bits do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from .. import backend, philox
from ..launch import TRITON_TYPES, CompileCase, Config, launch
from . import reference
from .triton_kernels import (
    latent_kv_adamw_kernel,
    latent_kv_dw_kernel,
    latent_kv_dz_kernel,
    latent_kv_fwd_kernel,
    latent_kv_gram_kernel,
)

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


# large: sizes and strides are multiples of 16 and nothing is dropped (`_large`). What an address or a mask costs is then
# small enough for twice the rows in half the registers: more bytes under way, and two blocks a multiprocessor.


def _bound(wide: bool, large: bool) -> int:
    if not large:
        return 255
    return 152 if wide else 128  # fp32 in halves and small blocks of sentences: some more than 128


def _warps(width: int) -> int:
    """So many that each thread loads 16 bytes of a block: blocks of 16 columns do not have them for more."""
    return 4 if width == 16 else 8


def _split_config(batch: int, nz: int, wide: bool, large: bool) -> Config:
    rows = (16 if wide else 32) * (2 if large else 1)
    sizes = {"BLOCK_R": rows, "BLOCK_B": _power(batch, _BATCH_BLOCKS), "BLOCK_K": _power(nz, _DEPTHS)}
    return Config(sizes, _warps(sizes["BLOCK_K"]), num_stages=3, max_registers=_bound(wide, large))


def _gram_config(batch: int, wide: bool, large: bool) -> Config:
    sizes = {"BLOCK_R": (16 if wide else 32) * (2 if large else 1), "BLOCK_B": _power(batch, _BATCH_BLOCKS)}
    return Config(sizes, _warps(sizes["BLOCK_B"]), num_stages=3, max_registers=_bound(wide, large))


def _tile_config(batch: int, nz: int, wide: bool, dropout: bool) -> Config:
    # A mask is made in registers: beside fp32 operands of 32 sentences Triton 3.6 would spill two of them.
    sentences = 16 if wide and dropout else _power(batch, (16, 32))
    sizes = {"BLOCK_R": 32, "BLOCK_B": sentences, "BLOCK_K": _power(nz, _DEPTHS)}
    if sizes["BLOCK_K"] == 16:
        sizes["BLOCK_R"] = 64  # or the loads of a block are few beside those of its scalars
    if sizes["BLOCK_K"] < 64:
        return Config(sizes, num_warps=4, num_stages=2)
    return Config(sizes, num_warps=8, num_stages=2, max_registers=128)


# ---- launchers -------------------------------------------------------------------------------------------------------


def _dense_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous() if x.shape[-1] > 1 and x.stride(-1) != 1 else x


def _weight_strides(weight: torch.Tensor) -> tuple[int, ...]:
    return weight.stride()[:5]


def _memory_strides(memory: torch.Tensor) -> tuple[int, ...]:
    return memory.stride()[:5]


def _streams(zs: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor], dropout: float) -> torch.Tensor:
    """int64 [batch, 4]: seed, offset, size of the batch and place in it of each sentence; anything without dropout."""
    if dropout == 0.0:
        return zs[0]
    rows = []
    for z, seed in zip(zs, seeds, strict=True):
        index, total = reference.places(seed, z.shape[0])
        rows.append(torch.stack([*(x.expand_as(index) for x in (seed[0], seed[1], total)), index], dim=1))
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


def _aligned(a: _Gradients, *tensors: torch.Tensor) -> bool:
    """Whether Triton knows all sizes and strides for multiples of 16 and so loads 16 bytes at a time: only then do three
    tiles of the optimizer's state fit beside the product without spilling."""
    strides = [stride for x in tensors for stride in _weight_strides(x)]
    return all(n % 16 == 0 for n in (*a.sizes, *a.strides, *strides))


def _large(a: _Gradients, *tensors: torch.Tensor) -> bool:
    return a.dropout == 0.0 and _aligned(a, *tensors)


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

    def tile_config(self) -> Config:
        return _tile_config(self.batch, self.nz, self.operand == tl.float32, self.dropout > 0.0)

    def blocks(self, config: Config) -> int:
        return self.groups * triton.cdiv(self.rows, config.constants["BLOCK_R"])

    def tile_grid(self, config: Config) -> tuple[int, int, int]:
        row_blocks = triton.cdiv(self.rows, config.constants["BLOCK_R"])
        return row_blocks, self.groups, triton.cdiv(self.nz, config.constants["BLOCK_K"])


def _dz(a: _Gradients, weight: torch.Tensor) -> torch.Tensor:
    config = _split_config(a.batch, a.nz, a.operand == tl.float32, _large(a, weight))
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
    config = a.tile_config()
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
        programs = torch.empty(a.tile_grid(a.tile_config()), dtype=torch.float32, device=a.device)
        _dw(a, norms=programs)
        return programs.sum(dtype=torch.float64).float()
    config = _gram_config(a.batch, a.grad.dtype == torch.float32, _large(a))
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
    config = a.tile_config()
    launch(
        latent_kv_adamw_kernel, a.tile_grid(config), a.device, config,
        a.grad, a.z, a.streams, weight, exp_avg, exp_avg_sq, hyper, *a.sizes, a.threshold, a.scale,
        1.0 - beta1, beta2, 1.0 - beta2, eps,
        *a.strides, *_weight_strides(weight), *_weight_strides(exp_avg), *_weight_strides(exp_avg_sq),
        OPERAND=a.operand, EARLY=_aligned(a, weight, exp_avg, exp_avg_sq), **a.flags,
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
    others = ((16, 16, False), (32, 32, False), (32, 128, False), (64, 32, False), (64, 128, False))
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

            def add(
                name: str, kernel: Any, config: Config, io=io, tag=tag, flags=flags, batch=batch, **constants: Any
            ) -> None:
                signature = {n: kind for n, kind in io.items() if n in kernel.arg_names}
                case = CompileCase(
                    f"{name}-{tag}", kernel, signature, config, {**flags, **constants}, tensor_cores=True
                )
                if name in ("adamw-early", "dz-large", "gram-large"):
                    # A warpgroup multiplies 64 rows, and these products have as many rows as there are sentences.
                    wgmma, most = name != "adamw-early" and batch == 64, config.max_registers or 255
                    case = replace(case, only_aligned=True, wide_loads=True, warpgroup=wgmma, max_registers=most)
                cases.append(case)

            wide = operand["OPERAND"] == tl.float32
            tile, split = _tile_config(batch, nz, wide, dropout), _split_config(batch, nz, wide, False)
            need = {"NEED_WEIGHT": True, "NEED_BIAS": True, "NEED_NORM": False}
            norm = {"NEED_WEIGHT": False, "NEED_BIAS": False, "NEED_NORM": True}
            add("fwd", latent_kv_fwd_kernel, _forward_config(batch, nz, weight == "fp32"), HAS_BIAS=True)
            add("dz", latent_kv_dz_kernel, split, **operand)
            add("dw", latent_kv_dw_kernel, tile, **need, **operand)
            add("norm", latent_kv_dw_kernel, tile, **norm, **operand)
            add("adamw", latent_kv_adamw_kernel, tile, EARLY=False, **operand)
            add("adamw-early", latent_kv_adamw_kernel, tile, EARLY=True, **operand)
            add("gram", latent_kv_gram_kernel, _gram_config(batch, memory == "fp32", False))
            if not dropout:
                add("dz-large", latent_kv_dz_kernel, _split_config(batch, nz, wide, True), **operand)
                add("gram-large", latent_kv_gram_kernel, _gram_config(batch, memory == "fp32", True))
    return cases


COMPILE_CASES = _cases()
