"""Argument checks of sample_token: every bad input is named, with both sizes, before any kernel runs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backend

LARGEST_VOCABULARY = 2**22  # beyond it the unit of the weights would show in the tails


def check_tensors(logits: Tensor, rows: Tensor | None, steps: Tensor | None, seen: Tensor | None) -> None:
    """Raise TypeError for wrong dtypes, ValueError for wrong shapes or devices."""
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= LARGEST_VOCABULARY:
        raise ValueError(f"logits must be [B, V] with 1 <= V <= {LARGEST_VOCABULARY}, got {list(logits.shape)}")
    if logits.dtype not in backend.FLOATS_AND_DOUBLE:
        raise TypeError(f"logits must be floating, got {logits.dtype}")
    for name, index in (("rows", rows), ("steps", steps)):
        if index is None:
            continue
        if index.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {index.dtype}")
        if index.shape != logits.shape[:1]:
            raise ValueError(
                f"{name} must be [{logits.shape[0]}] for logits {list(logits.shape)}, got {list(index.shape)}"
            )
        if index.device != logits.device:
            raise ValueError(f"{name} is on {index.device} and logits on {logits.device}")
    if seen is None:
        return
    if seen.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"seen must be bool or uint8, got {seen.dtype}")
    if seen.shape != logits.shape:
        raise ValueError(f"seen is {list(seen.shape)} and logits {list(logits.shape)}: they must have one shape")
    if seen.device != logits.device:
        raise ValueError(f"seen is on {seen.device} and logits on {logits.device}")


def check_options(
    greedy: bool, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, seen: Tensor | None
) -> None:
    """Raise ValueError for a number that is out of its range, or a penalty without the tokens it applies to."""
    # not math.isfinite: a graph may hold the numbers as symbols
    if not 0.0 < penalty < math.inf:
        raise ValueError(f"repetition_penalty={penalty} must be above 0 and finite")
    if penalty != 1.0 and seen is None:
        raise ValueError(f"repetition_penalty={penalty} needs seen, the tokens it applies to")
    if greedy:
        return
    if not 0.0 < temperature < math.inf:
        raise ValueError(
            f"temperature={temperature} must be above 0 and finite; greedy=True takes the most probable token"
        )
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k={top_k!r} must be an int, 0 (all tokens) or more")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} is not in (0, 1]")
    if not 0.0 <= min_p <= 1.0:
        raise ValueError(f"min_p={min_p} is not in [0, 1]")
