"""Argument checks of frozen_layer: every bad input is named, with both sizes, before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import ACTIVATIONS, GATED


def check_rows(name: str, x: Tensor, like: Tensor | None = None, shape: tuple[int, ...] | None = None) -> None:
    """Raise ValueError or TypeError unless ``name`` is a floating matrix, of ``shape`` and as ``like`` where they are given."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)}, it must be a floating [T, N]")
    if shape is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} is {list(x.shape)}, it must be {list(shape)}")
    if like is not None:
        _check_alike(name, x, like)


def check_vector(name: str, x: Tensor, like: Tensor) -> None:
    """The same for a vector with an entry for each column of ``like``, of its dtype or fp32."""
    if tuple(x.shape) != (like.shape[1],):
        raise ValueError(f"{name} is {list(x.shape)}, it must be [{like.shape[1]}]")
    if x.dtype != torch.float32 or x.device != like.device:
        _check_alike(name, x, like)


def check_stats(stats: Tensor, x: Tensor) -> None:
    """Raise ValueError unless these are the statistics of a norm of x."""
    if tuple(stats.shape) != (x.shape[0], 2):
        raise ValueError(f"stats is {list(stats.shape)}, it must be {[x.shape[0], 2]}")


def check_kind(kind: str, x: Tensor) -> None:
    """Raise ValueError for an activation that is not known, or whose rows cannot be halved."""
    if kind not in ACTIVATIONS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(ACTIVATIONS)}")
    if kind in GATED and x.shape[1] % 2:
        raise ValueError(f"x is {list(x.shape)}: {kind} needs an even number of columns, a gate and what passes it")


def check_turns(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Raise ValueError or TypeError for angles that do not fit the rows."""
    check_rows("cos", cos, x)
    check_rows("sin", sin, x, tuple(cos.shape))
    if cos.shape[0] != x.shape[0] or cos.shape[1] % 2 or not 0 <= heads * cos.shape[1] <= x.shape[1]:
        raise ValueError(f"{heads} heads by angles {list(cos.shape)} do not fit x {list(x.shape)}")


def _check_alike(name: str, x: Tensor, like: Tensor) -> None:
    if x.dtype != like.dtype or x.device != like.device:
        raise TypeError(f"{name} is {x.dtype} on {x.device}, x {like.dtype} on {like.device}")
