"""packed_linear in plain torch: the layout, and the product."""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 32  # columns that lie together (kLinearPanel in csrc/cpu/packed_linear.h)


def pack_weight(weight: Tensor) -> Tensor:
    """Weight [N, K] as [ceil(N / 32), K, 32]: 32 outputs side by side, panel after panel, zeros beyond N."""
    outputs, inputs = weight.shape
    panels = -(-outputs // PANEL)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, panels * PANEL - outputs))
    return padded.view(panels, PANEL, inputs).transpose(1, 2).contiguous()


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """x [M, K] @ weight^T + bias for a weight packed as above: [M, out_features]."""
    weight = packed.transpose(1, 2).reshape(-1, packed.shape[1])[:out_features]
    return torch.nn.functional.linear(x, weight, bias)
