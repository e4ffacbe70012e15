"""How far a model enlarges float32 rounding, and how far layers that stand for its own may be off by that."""

from __future__ import annotations

import torch
from torch import Tensor


def nudged(states: Tensor) -> Tensor:
    """Float32 states moved by a unit or two in the last place each, by a pattern."""
    count = states.numel()
    pattern = torch.linspace(0, 0.73 * count, count, device=states.device).sin().view(states.shape)
    return states * (1 + 2 * torch.finfo(torch.float32).eps * pattern)


def float32_limit(moved: float) -> float:
    """How far layers of ours may be off in float32, relative, where the model's own figures move by ``moved`` when what goes
    into them is `nudged`. Every product rounds as well, so that another order of its sums moves them tens of times as far; a
    model that enlarges rounding enlarges what a layer leaves out or computes wrong by as much."""
    return min(max(1e-4, 64 * moved), 1e-2)
