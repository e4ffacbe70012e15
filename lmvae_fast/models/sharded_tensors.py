"""Tensors that several processes hold in pieces (DTensors: training/sharding.py)."""

from __future__ import annotations

from torch import Tensor


def in_pieces(tensor: Tensor) -> bool:
    """Whether each process has a part of it only."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together from the pieces of all processes, who must all ask for it."""
    return tensor.full_tensor() if in_pieces(tensor) else tensor  # type: ignore[attr-defined]
