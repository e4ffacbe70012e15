"""frozen_layer in plain torch. Half types are computed in fp32 and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

ACTIVATIONS = ("gelu_tanh", "swiglu", "geglu_tanh")  # numbered as enum RowActivation in csrc/cpu/frozen_layer.h
GATED = ACTIVATIONS[1:]


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """LayerNorm (centred) or RMSNorm of rows [T, N], and [T, 2]: the mean (0 for RMSNorm) and 1 / deviation."""
    wide, factor = _wide(x, weight)
    mean = wide.mean(1, keepdim=True) if centred else wide.new_zeros((x.shape[0], 1))
    scale = ((wide - mean).square().mean(1, keepdim=True) + eps).rsqrt()
    y = (wide - mean) * scale * factor
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), torch.cat([mean, scale], dim=1)


def norm_gradient(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor, added: Tensor | None, centred: bool
) -> Tensor:
    """The gradient by x of such a norm, given that of its output; plus ``added``."""
    wide, rows, factor = _wide(grad, x, weight)
    mean, scale = stats.to(rows.dtype).split(1, dim=1)
    unit, rows = (rows - mean) * scale, wide * factor
    across = rows.mean(1, keepdim=True) if centred else 0.0
    out = scale * (rows - across - unit * (rows * unit).mean(1, keepdim=True))
    return (out if added is None else out + added).to(x.dtype)


def activation(x: Tensor, kind: str) -> Tensor:
    """GELU in its tanh form of rows [T, N]; or ``silu(gate) * up``, or this GELU's, of rows [gate, up] [T, 2 N]."""
    (wide,) = _wide(x)
    if kind == "gelu_tanh":
        return gelu(wide, approximate="tanh").to(x.dtype)
    gate, up = wide.chunk(2, dim=1)
    return ((silu(gate) if kind == "swiglu" else gelu(gate, approximate="tanh")) * up).to(x.dtype)


def activation_gradient(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    """The gradient by x of such an activation."""
    wide, rows = _wide(grad, x)
    with torch.enable_grad():
        rows = rows.detach().requires_grad_()
        out = activation(rows, kind)
    return torch.autograd.grad(out, rows, wide)[0].to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int, back: bool) -> Tensor:
    """Rows [T, W] whose first ``heads`` heads are turned by angles [T, D], halves of a head paired; or turned back."""
    dim = cos.shape[1]
    wide, cos, sin = _wide(x, cos, sin)
    part = wide[:, : heads * dim].unflatten(1, (heads, dim))
    cos, sin = cos[:, None], sin[:, None]
    if back:
        left, right = (part * sin).chunk(2, dim=-1)
        part = part * cos + torch.cat([right, -left], dim=-1)
    else:
        left, right = part.chunk(2, dim=-1)
        part = part * cos + torch.cat([-right, left], dim=-1) * sin
    return torch.cat([part.flatten(1), wide[:, heads * dim :]], dim=1).to(x.dtype)
