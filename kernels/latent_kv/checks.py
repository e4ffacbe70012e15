"""Argument checks of latent_kv: every bad input is named, with both sizes, before any kernel runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend, philox
from ..inplace import check_written


def check_operands(z: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError or TypeError naming the argument and both sizes unless z, weight and bias belong together."""
    if z.dim() != 2:
        raise ValueError(f"z must be [B, nz], got {list(z.shape)}")
    if weight.dim() != 6 or weight.shape[1] != 2:
        raise ValueError(f"weight must be [L, 2, Hkv, M, D, nz], got {list(weight.shape)}")
    if weight.shape[-1] != z.shape[1]:
        raise ValueError(f"weight takes nz = {weight.shape[-1]} (its last dim), z has nz = {z.shape[1]}")
    if weight.shape[-1] == 0:
        raise ValueError("weight and z have nz = 0: a latent needs at least one dimension")
    if weight.dtype not in backend.FLOATS_AND_DOUBLE or z.dtype not in backend.FLOATS_AND_DOUBLE:
        raise TypeError(f"z is {z.dtype} and weight {weight.dtype}: both must be floating")
    if z.dtype != weight.dtype and not torch.is_autocast_enabled(z.device.type):
        raise TypeError(f"z is {z.dtype} and weight {weight.dtype}: they must have one dtype outside autocast")
    if z.device != weight.device:
        raise ValueError(f"z is on {z.device} and weight on {weight.device}")
    if bias is None:
        return
    if bias.shape != weight.shape[:-1]:
        raise ValueError(f"bias must be {list(weight.shape[:-1])} (weight's dims but the last), got {list(bias.shape)}")
    if bias.dtype != weight.dtype:
        raise TypeError(f"bias is {bias.dtype} and weight {weight.dtype}: they must have one dtype")
    if bias.device != weight.device:
        raise ValueError(f"bias is on {bias.device} and weight on {weight.device}")


def check_latent_kv(
    z: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, dtype: torch.dtype | None
) -> torch.dtype:
    """Raise TypeError or ValueError on bad input; return the memory's dtype."""
    check_operands(z, weight, bias)
    if dtype is not None and dtype not in backend.FLOATS_AND_DOUBLE:
        raise TypeError(f"dtype={dtype} is not a floating dtype that latent_kv writes")
    if out is None:
        if dtype is not None:
            return dtype
        autocast = torch.is_autocast_enabled(z.device.type) and weight.dtype != torch.float64
        return torch.get_autocast_dtype(z.device.type) if autocast else weight.dtype
    layers, two, heads, slots, dim, _ = weight.shape
    want = [layers, two, z.shape[0], heads, slots, dim]
    if list(out.shape) != want:
        raise ValueError(f"out must be {want} ([L, 2, B, Hkv, M, D] for this z and weight), got {list(out.shape)}")
    if dim > 1 and out.stride(-1) != 1:
        raise ValueError(f"out must have a contiguous last dim (stride 1), got stride {out.stride(-1)}")
    if out.device != z.device:
        raise ValueError(f"out is on {out.device} and z on {z.device}")
    if out.dtype not in backend.FLOATS_AND_DOUBLE or (dtype is not None and dtype != out.dtype):
        raise TypeError(f"out is {out.dtype}, the memory asked for is {dtype or 'floating'}")
    check_written(out=out)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (z, weight, bias, out)):
        raise ValueError("out= has no gradient, but z, weight, bias or out requires one: use torch.no_grad()")
    return out.dtype


def check_gradients(
    weight: Tensor, grads: Sequence[Tensor], zs: Sequence[Tensor], seeds: Sequence[Tensor], dropout: float
) -> None:
    """Raise ValueError or TypeError unless grads, zs and seeds are those of forwards of `weight`."""
    if not len(grads) == len(zs) > 0:
        raise ValueError(f"grads and zs must be as many, and at least one, got {len(grads)} and {len(zs)}")
    philox.dropout_threshold(dropout)
    if dropout > 0.0 and len(seeds) != len(zs):
        raise ValueError(f"seeds must be as many as zs when dropout > 0, got {len(seeds)} and {len(zs)}")
    for grad, z in zip(grads, zs, strict=True):
        check_operands(z, weight, None)
        layers, two, heads, slots, dim, _ = weight.shape
        want = [layers, two, z.shape[0], heads, slots, dim]
        if list(grad.shape) != want:
            raise ValueError(f"grads must be {want} ([L, 2, B, Hkv, M, D] of its z), got {list(grad.shape)}")
        if grad.device != weight.device:
            raise ValueError(f"grads are on {grad.device} and weight on {weight.device}")
        if grad.dtype not in backend.FLOATS_AND_DOUBLE:
            raise TypeError(f"grads are {grad.dtype}, they must be floating")


def check_step(weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, lr: Tensor, clip: Tensor) -> None:
    """Raise ValueError or TypeError unless the moments are weight's and can be updated in place, and scalars are scalars."""
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if moment.shape != weight.shape:
            raise ValueError(f"{name} must be {list(weight.shape)} like weight, got {list(moment.shape)}")
        if moment.dtype != exp_avg.dtype or moment.dtype not in (*backend.FLOATS, weight.dtype):
            raise TypeError(f"{name} is {moment.dtype}: moments must have one dtype, fp32, fp16, bf16 or weight's")
        if moment.device != weight.device:
            raise ValueError(f"{name} is on {moment.device} and weight on {weight.device}")
    for name, tensor in (("weight", weight), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} is updated in place: its last dim must have stride 1, got {tensor.stride(-1)}")
    for name, scalar in (("step", step), ("lr", lr), ("clip", clip)):
        if scalar.numel() != 1 or scalar.device != weight.device:
            have = f"{list(scalar.shape)} on {scalar.device}"
            raise ValueError(f"{name} must be a scalar tensor on {weight.device}, got {have}")
    check_written(weight=weight, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
