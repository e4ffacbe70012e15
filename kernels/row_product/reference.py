"""row_product in plain torch. Half types are computed in fp32; the normed rows and the result are rounded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..frozen_layer import reference as frozen_layer


class Norm(NamedTuple):
    """LayerNorm of rows, or RMSNorm: ``weight`` and ``bias`` ``[K]``; ``centred`` says whether the mean is taken off."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool


def row_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, activation: str | None, added: Tensor | None
) -> Tensor:
    """``activation(norm(x) W^T + bias) + added`` of rows [T, K] and a weight [N, K]."""
    if norm is not None:
        x = frozen_layer.norm(x, norm.weight, norm.bias, norm.eps, norm.centred)[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).t()
    if bias is not None:
        y = y + bias
    if activation is not None:
        y = frozen_layer.activation(y, activation)
    return (y if added is None else y + added).to(x.dtype)
