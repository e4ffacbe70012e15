"""Activations that Hugging Face spells out operator by operator, as torch's fused ones: the same functions, one pass.

GPT-2's GELU is eight passes over [tokens, 4 * width] forward and more backward; as one operator it is two in all.
"""

from __future__ import annotations

from torch import nn
from transformers import activations

# All three are GELU's tanh form 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), written in three ways.
_TANH_GELU = (activations.NewGELUActivation, activations.FastGELUActivation, activations.AccurateGELUActivation)


def fuse_activations(model: nn.Module) -> int:
    """Replace spelled-out activations in place; returns how many."""
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, _TANH_GELU)
    ]
    for parent, name in found:
        setattr(parent, name, nn.GELU(approximate="tanh"))
    return len(found)
