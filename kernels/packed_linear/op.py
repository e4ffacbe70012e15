"""packed_linear: registration and the public functions. The truth is reference.py.

CPU only, fp32 only, no gradient: it serves decoding with frozen weights, where a product of few rows waits for the weight's
bytes as long as it computes. On CUDA that is cuBLAS's work, and in bf16 the CPU's matrix units are oneDNN's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ..registration import define, primitives, refuse_vmap
from . import reference
from .reference import PANEL

# ---- primitives ------------------------------------------------------------------------------------------------------


def _fake(x, weight, bias, out_features):
    return x.new_empty((x.shape[0], out_features))


define("packed_linear(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor", fake=_fake)
backend.register("packed_linear", cpp=backend.Support((torch.float32,), ("packed_linear",)))

# ---- the public functions --------------------------------------------------------------------------------------------


def pack_weight(weight: Tensor) -> Tensor:
    """Weight ``[N, K]`` in the layout of `packed_linear`, a copy: ``[ceil(N / 32), K, 32]``, contiguous.

    Raises ValueError or TypeError for anything but a floating matrix with rows and columns.
    """
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be [N, K], neither of them 0, got {list(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight is {weight.dtype}, it must be floating")
    return reference.pack_weight(weight.detach())


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None, *, out_features: int) -> Tensor:
    """``x @ weight.T + bias`` for a weight packed by `pack_weight`. Not differentiable.

    Args:
        x: ``[..., K]``, any strides. Written for 2 to some 64 rows: more are right, but not faster than a plain product.
        packed: ``[ceil(N / 32), K, 32]``, of x's dtype and device.
        bias: ``[N]`` or None.
        out_features: N.

    Returns:
        ``[..., N]`` in x's dtype, contiguous.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit.
        BackendError: when a forced backend cannot run.
    """
    refuse_vmap("packed_linear", x, packed, bias)
    if x.dim() < 1 or packed.dim() != 3 or packed.shape[1] != x.shape[-1] or packed.shape[2] != PANEL:
        have = f"x is {list(x.shape)} and packed {list(packed.shape)}"
        raise ValueError(f"{have}: they must be [..., K] and [panels, K, {PANEL}]")
    if packed.shape[0] != -(-out_features // PANEL):
        raise ValueError(f"out_features={out_features} does not fit the {packed.shape[0]} panels of {PANEL} of packed")
    if bias is not None and list(bias.shape) != [out_features]:
        raise ValueError(f"bias is {list(bias.shape)}, it must be [{out_features}]")
    for name, other in (("packed", packed), ("bias", bias)):
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise TypeError(f"{name} is {other.dtype} on {other.device}, x {x.dtype} on {x.device}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, packed, bias)):
        raise ValueError("packed_linear has no gradient: x, packed and bias must not require one")
    rows = x.reshape(-1, x.shape[-1])
    choice = backend.choose("packed_linear", x)
    if choice == "reference":
        y = reference.packed_linear(rows, packed, bias, out_features)
    else:
        y = primitives(choice, x).packed_linear(rows, packed.contiguous(), bias, out_features)
    return y.view(*x.shape[:-1], out_features)
