"""Argument checks of lm_head_loss: every bad input is named, with both sizes, before any kernel runs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backend import FLOATS_AND_DOUBLE
from .reference import IGNORE_INDEX


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """ValueError for a label (on the CPU) outside the vocabulary that is not the ignored one."""
    bad = ((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= vocabulary)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"lm_head_loss: labels[{at}] is {int(labels[at])}, outside the vocabulary [0, {vocabulary}) "
            f"(weight has {vocabulary} rows; only {IGNORE_INDEX} is ignored)"
        )


def check_lm_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    chunk: int | None,
) -> None:
    """Raise TypeError for wrong dtypes, ValueError for wrong shapes, devices or numbers; labels are not read."""
    if hidden.dim() != 2:
        raise ValueError(f"lm_head_loss: hidden must be [tokens, width], got shape {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"lm_head_loss: weight must be [vocabulary, {hidden.shape[1]}] as hidden is {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError("lm_head_loss: weight has an empty vocabulary (0 rows)")
    if hidden.dtype not in FLOATS_AND_DOUBLE:
        raise TypeError(f"lm_head_loss: hidden must be fp32, fp16, bf16 or fp64, got {hidden.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"lm_head_loss: labels must be int64, got {labels.dtype}")
    for name, value, shape in (
        ("labels", labels, (hidden.shape[0],)),
        ("bias", bias, (weight.shape[0],)),
        ("token_weights", token_weights, (hidden.shape[0],)),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"lm_head_loss: {name} must have shape {shape} (hidden {tuple(hidden.shape)}, weight "
                f"{tuple(weight.shape)}), got {tuple(value.shape)}"
            )
    for name, value in (("weight", weight), ("labels", labels), ("bias", bias), ("token_weights", token_weights)):
        if value is None:
            continue
        if value.device != hidden.device:
            raise ValueError(f"lm_head_loss: {name} is on {value.device}, hidden on {hidden.device}")
        if name in ("weight", "bias") and value.dtype != hidden.dtype:
            raise TypeError(f"lm_head_loss: {name} is {value.dtype}, hidden is {hidden.dtype}")
        if name == "token_weights" and not value.dtype.is_floating_point:
            raise TypeError(f"lm_head_loss: token_weights must be floating, got {value.dtype}")
    # not math.isfinite: a graph may hold the numbers as symbols
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"lm_head_loss: softcap must be > 0 and finite, or None, got {softcap}")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"lm_head_loss: logit_scale must be finite, got {logit_scale}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"lm_head_loss: chunk must be >= 1 token, got {chunk}")
