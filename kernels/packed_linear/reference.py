"""packed_linear in plain torch: the layout, and the product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

PANEL = 32  # columns that lie together (kLinearPanel in csrc/cpu/packed_linear.h)
ACTIVATIONS = ("none", "gelu_tanh", "swiglu")  # numbered as enum Activation there


def pack_weight(weight: Tensor) -> Tensor:
    """Weight [N, K] as [ceil(N / 32), K, 32]: 32 outputs side by side, panel after panel, zeros beyond N."""
    outputs, inputs = weight.shape
    panels = -(-outputs // PANEL)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, panels * PANEL - outputs))
    return padded.view(panels, PANEL, inputs).transpose(1, 2).contiguous()


def pack_gated(gate: Tensor, up: Tensor) -> Tensor:
    """Weights [N, K] of a gate and of what passes it as [ceil(N / 16), K, 32]: 16 outputs of each side by side."""
    half = PANEL // 2
    filled = -gate.shape[0] % half
    parts = [torch.nn.functional.pad(w, (0, 0, 0, filled)).view(-1, half, w.shape[1]) for w in (gate, up)]
    return torch.cat(parts, dim=1).transpose(1, 2).contiguous()


def packed_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, out_features: int
) -> Tensor:
    """activation(x [M, K] @ weight^T + bias) + residual for a weight packed as above: [M, out_features]."""
    if activation == "swiglu":
        halves = packed.transpose(1, 2).unflatten(1, (2, -1)).transpose(0, 1).flatten(1, 2)[:, :out_features]
        gate, up = halves.contiguous()
        y = silu(x @ gate.t()) * (x @ up.t())
    else:
        # Row-major, as the weight was: with a single panel it would be a turned view, which a BLAS sums in another order.
        weight = packed.transpose(1, 2).reshape(-1, packed.shape[1])[:out_features].contiguous()
        y = torch.nn.functional.linear(x, weight, bias)
        y = gelu(y, approximate="tanh") if activation == "gelu_tanh" else y
    return y if residual is None else y + residual
