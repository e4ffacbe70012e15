"""Argument checks of coupling_flow: every bad input is named, with both sizes, before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import FlowParams, FlowSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MEMORY = ("save", "recompute")


def check_coupling_flow(x: Tensor, params: FlowParams, cond: Tensor | None, memory: str) -> None:
    """Raise TypeError for what has the wrong type or dtype, ValueError for what has the wrong shape, device or value."""
    if not isinstance(params, FlowParams):
        raise TypeError(f"params must be FlowParams, got {type(params).__name__}")
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {MEMORY}, got {memory!r}")
    spec, theta = params.spec, params.theta
    _check_floating("x", x, theta)
    _check_floating("params.theta", theta, theta)
    _check_matrix("x", x, spec.dim, "dim")
    _check_flats(params)
    if cond is None:
        if spec.cond_dim:
            raise ValueError(f"cond is missing: the flow is conditioned on cond_dim={spec.cond_dim} numbers per row")
        return
    if spec.cond_dim == 0:
        raise ValueError(f"cond was given but the flow has cond_dim=0; got shape {tuple(cond.shape)}")
    _check_floating("cond", cond, theta)
    _check_matrix("cond", cond, spec.cond_dim, "cond_dim")
    if cond.shape[0] != x.shape[0]:
        raise ValueError(f"cond has {cond.shape[0]} rows, x has {x.shape[0]}: they must be equal")


def _check_floating(name: str, x: Tensor, theta: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.dtype != theta.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, params.theta has {theta.dtype}: they must be the same")
    if x.device != theta.device:
        raise ValueError(f"{name} is on {x.device}, params.theta on {theta.device}: they must be on one device")


def _check_matrix(name: str, x: Tensor, width: int, meaning: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name} must be [batch, {meaning}] (rank 2), got shape {tuple(x.shape)}")
    if x.shape[1] != width:
        raise ValueError(f"{name} has {x.shape[1]} columns, the flow has {meaning}={width}: they must be equal")


def _check_flats(params: FlowParams) -> None:
    spec: FlowSpec = params.spec
    for name, flat, size in zip(
        ("theta", "constants", "indices"), (params.theta, params.constants, params.indices), spec.sizes, strict=True
    ):
        if flat.dim() != 1 or flat.shape[0] != size:
            raise ValueError(f"params.{name} must have shape ({size},) for this spec, got {tuple(flat.shape)}")
        if flat.device != params.theta.device:
            raise ValueError(f"params.{name} is on {flat.device}, params.theta on {params.theta.device}")
    if params.constants.dtype != params.theta.dtype:
        raise TypeError(f"params.constants has dtype {params.constants.dtype}, params.theta has {params.theta.dtype}")
    if params.indices.dtype != torch.int32:
        raise TypeError(f"params.indices must be int32, got {params.indices.dtype}")
