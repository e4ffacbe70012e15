"""packed_linear: registration and the public functions. The truth is reference.py.

CPU only, fp32 and bf16, no gradient: it serves decoding with frozen weights, where a product of few rows waits for the
weight's bytes as long as it computes. On CUDA that is cuBLAS's work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ..registration import define, primitives, refuse_gradients, refuse_vmap
from . import reference
from .checks import check_gated, check_packed_linear, check_weight
from .reference import ACTIVATIONS

# ---- primitives ------------------------------------------------------------------------------------------------------


def _fake(x, weight, bias, residual, activation, out_features):
    return x.new_empty((x.shape[0], out_features))


define(
    "packed_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int activation, int out_features) -> Tensor",
    fake=_fake,
)
backend.register("packed_linear", cpp=backend.Support((torch.float32, torch.bfloat16), ("packed_linear",)))

# ---- the public functions --------------------------------------------------------------------------------------------


def pack_weight(weight: Tensor) -> Tensor:
    """Weight ``[N, K]`` in the layout of `packed_linear`, a copy: ``[ceil(N / 32), K, 32]``, in bf16
    ``[ceil(N / 32), ceil(K / 32), 2, 16, 16, 2]`` (`reference.pair_depths`), contiguous.

    Raises ValueError or TypeError for anything but a floating matrix with rows and columns.
    """
    check_weight("weight", weight)
    return reference.pack_weight(weight.detach())


def pack_gated(gate: Tensor, up: Tensor) -> Tensor:
    """Weights ``[N, K]`` of a gated layer in the layout of `packed_linear` with ``activation="swiglu"``, a copy:
    ``[ceil(N / 16), K, 32]``, in bf16 ``[ceil(N / 16), ceil(K / 32), 2, 16, 16, 2]``, contiguous. Raises as
    `pack_weight`, and ValueError for two different shapes."""
    check_gated(gate, up)
    return reference.pack_gated(gate.detach(), up.detach())


def packed_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(x @ weight.T + bias) + residual`` for a weight packed by `pack_weight`. Not differentiable.

    Args:
        x: ``[..., K]``, any strides. Written for the rows of a decoding step: more than `most_rows` are right, but not fast.
        packed: of `pack_weight`, of x's dtype and device.
        bias: ``[N]`` or None.
        out_features: N.
        activation: "none", "gelu_tanh", or "swiglu": ``silu(x @ gate.T) * (x @ up.T)`` for the weights of
            `pack_gated`, without bias.
        residual: ``[..., N]``, added last, or None.

    Returns:
        ``[..., N]`` in x's dtype, contiguous; sums, bias, activation and residual are fp32, rounded once.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or names that do not fit.
        BackendError: when a forced backend cannot run.
    """
    refuse_vmap("packed_linear", x, packed, bias, residual)
    check_packed_linear(x, packed, bias, residual, out_features, activation)
    refuse_gradients("packed_linear", x=x, packed=packed, bias=bias, residual=residual)
    rows, added = x.reshape(-1, x.shape[-1]), None if residual is None else residual.reshape(-1, out_features)
    choice = backend.choose("packed_linear", x)
    if choice == "reference":
        y = reference.packed_linear(rows, packed, bias, added, activation, out_features)
    else:
        number = ACTIVATIONS.index(activation)
        y = primitives(choice, x).packed_linear(rows, packed.contiguous(), bias, added, number, out_features)
    return y.view(*x.shape[:-1], out_features)
