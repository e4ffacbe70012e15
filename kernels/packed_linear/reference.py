"""packed_linear in plain torch: the layout, and the product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

PANEL = 32  # columns that lie together (kLinearPanel in csrc/cpu/packed_linear.h)
STEP = 32  # depths that lie together in bf16 (kHalfStep there)
BYTE_STEP = 64  # in int8 (kByteStep there)
ACTIVATIONS = ("none", "gelu_tanh", "swiglu")  # numbered as enum Activation there


def pack_weight(weight: Tensor) -> Tensor:
    """Weight [N, K] as [ceil(N / 32), K, 32]: 32 outputs side by side, panel after panel, zeros beyond N. In bf16 as
    `pair_depths` has them."""
    return _laid_out(panels_of(weight))


def pack_gated(gate: Tensor, up: Tensor) -> Tensor:
    """Weights [N, K] of a gate and of what passes it as [ceil(N / 16), K, 32]: 16 outputs of each side by side. In bf16
    as `pair_depths` has them."""
    return _laid_out(gated_panels_of(gate, up))


def panels_of(weight: Tensor) -> Tensor:
    """Weight [N, K] as [ceil(N / 32), 32, K], zeros beyond N."""
    outputs, inputs = weight.shape
    return torch.nn.functional.pad(weight, (0, 0, 0, -outputs % PANEL)).view(-1, PANEL, inputs)


def gated_panels_of(gate: Tensor, up: Tensor) -> Tensor:
    """Weights [N, K] as [ceil(N / 16), 32, K]: 16 outputs of the gate, then the same of what passes it."""
    half = PANEL // 2
    filled = -gate.shape[0] % half
    parts = [torch.nn.functional.pad(w, (0, 0, 0, filled)).view(-1, half, w.shape[1]) for w in (gate, up)]
    return torch.cat(parts, dim=1)


def _laid_out(panels: Tensor) -> Tensor:
    return pair_depths(panels) if panels.dtype == torch.bfloat16 else panels.transpose(1, 2).contiguous()


def pair_depths(panels: Tensor) -> Tensor:
    """Panels [P, 32, K] as [P, ceil(K / 32), 2, 16, 16, 2]: steps of 32 depths, halves of 16 outputs, 16 pairs of depths,
    the outputs, the two depths of the pair; zeros beyond K. Dot products of pairs, and AMX tiles, read them like that."""
    return _in_steps(panels, 2)


def group_depths(panels: Tensor) -> Tensor:
    """Panels [P, 32, K] as [P, ceil(K / 64), 2, 16, 16, 4]: the same with four depths of one byte in place of two."""
    return _in_steps(panels, 4)


def _in_steps(panels: Tensor, group: int) -> Tensor:
    count, _, inputs = panels.shape
    step = group * PANEL // 2
    padded = torch.nn.functional.pad(panels, (0, -inputs % step))
    return padded.view(count, 2, PANEL // 2, -1, PANEL // 2, group).permute(0, 3, 1, 4, 2, 5).contiguous()


def unpack(packed: Tensor, inputs: int) -> Tensor:
    """The panels [P, 32, K] of a packed weight of K inputs."""
    if packed.dim() == 3:
        return packed.transpose(1, 2)
    return packed.permute(0, 2, 4, 1, 3, 5).reshape(packed.shape[0], PANEL, -1)[..., :inputs]


def round_to_int8(panels: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers of -127 .. 127 and what they count, fp32 [P, 32], for panels [P, 32, K]."""
    scales = panels.float().abs().amax(-1) / 127
    whole = (panels.float() / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().clamp(-127, 127)
    return whole.to(torch.int8), scales


def packed_linear_int8(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_features: int,
) -> Tensor:
    """The product with the weight that int8 values and their scales stand for, which is rounded to x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    panels = unpack(values, x.shape[1]).to(wide) * scales.to(wide)[..., None]
    return _product(x, panels.to(x.dtype), bias, residual, activation, out_features)


def packed_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, out_features: int
) -> Tensor:
    """activation(x [M, K] @ weight^T + bias) + residual for a weight packed as above: [M, out_features]."""
    return _product(x, unpack(packed, x.shape[1]), bias, residual, activation, out_features)


def _product(
    x: Tensor, panels: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, out_features: int
) -> Tensor:
    if activation == "swiglu":
        halves = panels.unflatten(1, (2, -1)).transpose(0, 1).flatten(1, 2)[:, :out_features]
        gate, up = halves.contiguous()
        y = silu(x @ gate.t()) * (x @ up.t())
    else:
        # Row-major, as the weight was: with a single panel it would be a turned view, which a BLAS sums in another order.
        weight = panels.reshape(-1, x.shape[1])[:out_features].contiguous()
        y = torch.nn.functional.linear(x, weight, bias)
        y = gelu(y, approximate="tanh") if activation == "gelu_tanh" else y
    return y if residual is None else y + residual
