"""Whether this machine multiplies in bfloat16 at all, which recipes ask for and some processors only imitate."""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

_SLOWER = (
    "precision='bf16': this device (%s) has no bfloat16 products, and imitates them at a fraction of its float32 rate; "
    "precision='fp32' is faster here"
)


def multiplies_bf16(device: str) -> bool:
    """Whether bfloat16 products run at least as fast as float32's on this kind of device ("cpu", "cuda"): on a CPU by the
    library that torch has them from, which wants AVX-512 (or bfloat16 instructions of its own on other makes)."""
    if device == "cpu":
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def settled(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's fields of TrainConfig for the device that a run takes by itself: fp32 for bf16 where that is the slower."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.get("precision") != "bf16" or multiplies_bf16(device):
        return dict(recipe)
    logger.info("precision='fp32' in place of the recipe's 'bf16', which this device only imitates")
    return {**recipe, "precision": "fp32"}


def warn_of_imitated(precision: str, device: str) -> None:
    """Says so where a run will be slower in the precision it asks for."""
    if precision == "bf16" and not multiplies_bf16(device):
        logger.warning(_SLOWER, device)
