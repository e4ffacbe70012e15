"""Argument checks of aggregate_logpdf: every bad input is named, with both sizes, before any kernel runs."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .. import backend


def check_tensors(z: Tensor, mu: Tensor, logvar: Tensor, min_var: float) -> None:
    """Types, dtypes, devices and shapes of the densities themselves."""
    for name, x in (("z", z), ("mu", mu), ("logvar", logvar)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in backend.FLOATS_AND_DOUBLE:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
        if x.dtype != mu.dtype:
            raise TypeError(f"{name} is {x.dtype} and mu {mu.dtype}: they must have one dtype")
        if x.device != mu.device:
            raise ValueError(f"{name} is on {x.device} and mu on {mu.device}: they must be on one device")
    if mu.dim() != 2 or mu.shape[1] < 1:
        raise ValueError(f"mu must be [N, D] with D at least 1, got {list(mu.shape)}")
    if logvar.shape != mu.shape:
        raise ValueError(f"mu is {list(mu.shape)} and logvar {list(logvar.shape)}: they must have one shape")
    if z.dim() < 2 or z.shape[-1] != mu.shape[1]:
        raise ValueError(f"z must be [..., K, D] with D = {mu.shape[1]} as in mu {list(mu.shape)}, got {list(z.shape)}")
    if z.numel() and not mu.shape[0]:
        raise ValueError(
            f"z {list(z.shape)} has rows, but mu {list(mu.shape)} has no posterior: their mean is not defined"
        )
    if not (isinstance(min_var, (int, float)) and 0.0 <= min_var < math.inf):
        raise ValueError(f"min_var={min_var!r} must be finite and not negative")


def check_ids(name: str, ids: object, rows: int, what: str, device: torch.device) -> None:
    """One vector of group ids."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"groups: {name} must be a tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"groups: {name} must be int32 or int64, got {ids.dtype}")
    if ids.dim() != 1 or ids.shape[0] != rows:
        raise ValueError(f"groups: {name} must be [{rows}], one per {what}, got {list(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"groups: {name} is on {ids.device} and mu on {device}: they must be on one device")


def check_offsets(cu_z: Tensor, cu_posteriors: Tensor, rows: int, posteriors: int, device: torch.device) -> None:
    """Two vectors of offsets; their values only where no device has to be waited for (the C++ form looks by itself)."""
    for name, cu in (("cu_z", cu_z), ("cu_posteriors", cu_posteriors)):
        if not isinstance(cu, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(cu).__name__}")
        if cu.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {cu.dtype}")
        if cu.dim() != 1 or cu.shape[0] < 1:
            raise ValueError(f"{name} must be [groups + 1], got {list(cu.shape)}")
        if cu.device != device:
            raise ValueError(f"{name} is on {cu.device} and mu on {device}: they must be on one device")
    if cu_z.shape != cu_posteriors.shape:
        raise ValueError(
            f"cu_z is {list(cu_z.shape)} and cu_posteriors {list(cu_posteriors.shape)}: they must be one size"
        )
    if device.type != "cpu" or torch.compiler.is_compiling():
        return
    sizes = []
    for name, cu, end, what in (
        ("cu_z", cu_z, rows, "rows of z"),
        ("cu_posteriors", cu_posteriors, posteriors, "posteriors"),
    ):
        values = cu.tolist()
        if values[0] != 0 or values[-1] != end:
            raise ValueError(f"{name} must run from 0 to the {end} {what}, got {values[0]} to {values[-1]}")
        size = [b - a for a, b in itertools.pairwise(values)]
        if size and min(size) < 0:
            raise ValueError(f"{name} must not decrease, but group {size.index(min(size))} has {min(size)} {what}")
        sizes.append(size)
    for group, (count, members) in enumerate(zip(*sizes, strict=True)):
        if count and not members:
            raise ValueError(f"group {group} has {count} rows of z and no posterior: their mean is not defined")
