"""packed_linear: registration and the public functions. The truth is reference.py.

CPU only, fp32 only, no gradient: it serves decoding with frozen weights, where a product of few rows waits for the weight's
bytes as long as it computes. On CUDA that is cuBLAS's work, and in bf16 the CPU's matrix units are oneDNN's.
"""

from __future__ import annotations

from functools import cache

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
backend.register("packed_linear", cpp=backend.Support((torch.float32,), ("packed_linear",)))

# Rows up to which it is ahead of oneDNN's packed product (its record): on the vector units, and on the AMX tiles.
_MOST_ROWS, _MOST_ROWS_ON_TILES = 48, 1024

# ---- the public functions --------------------------------------------------------------------------------------------


@cache
def most_rows() -> int:
    """Rows up to which `packed_linear` is the fastest product of this machine's CPU; 0 without the C++ extension."""
    if not backend.extension()[0]:
        return 0
    return _MOST_ROWS_ON_TILES if torch.ops.lmvae_fast.packed_linear_has_tiles() else _MOST_ROWS


def pack_weight(weight: Tensor) -> Tensor:
    """Weight ``[N, K]`` in the layout of `packed_linear`, a copy: ``[ceil(N / 32), K, 32]``, contiguous.

    Raises ValueError or TypeError for anything but a floating matrix with rows and columns.
    """
    check_weight("weight", weight)
    return reference.pack_weight(weight.detach())


def pack_gated(gate: Tensor, up: Tensor) -> Tensor:
    """Weights ``[N, K]`` of a gated layer in the layout of `packed_linear` with ``activation="swiglu"``, a copy:
    ``[ceil(N / 16), K, 32]``, contiguous. Raises as `pack_weight`, and ValueError for two different shapes."""
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
        x: ``[..., K]``, any strides. Written for the rows of a decoding step: more than `most_rows()` are right, but not fast.
        packed: ``[ceil(N / 32), K, 32]``, of x's dtype and device.
        bias: ``[N]`` or None.
        out_features: N.
        activation: "none", "gelu_tanh", or "swiglu": ``silu(x @ gate.T) * (x @ up.T)`` for the ``[ceil(N / 16), K, 32]``
            of `pack_gated`, without bias.
        residual: ``[..., N]``, added last, or None.

    Returns:
        ``[..., N]`` in x's dtype, contiguous.

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


class PackedLinear:
    """A linear map whose weight, bias and activation stay: `packed_linear` with its checks made once.

    A decoding step makes some fifty of these calls, beside which checking each of them anew shows.

    Args:
        packed, bias, out_features, activation: as for `packed_linear`.
    """

    def __init__(self, packed: Tensor, bias: Tensor | None = None, *, out_features: int, activation: str = "none"):
        self.packed, self.bias, self.out_features = packed.contiguous(), bias, out_features
        self.activation = activation
        none = packed.new_empty((0, packed.shape[1]))
        packed_linear(none, packed, bias, out_features=out_features, activation=activation)
        self._choices: dict[str, str] = {}  # the backend, for each one that may be forced

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[..., K]`` to ``[..., N]``, the residual ``[..., N]`` added. Not differentiable; the kernel looks at sizes and
        dtype. Raises ValueError for a tensor that requires a gradient where gradients are recorded, else as
        `packed_linear`, or RuntimeError from the kernel."""
        forced = backend.current()
        choice = self._choices.get(forced) or self._choices.setdefault(
            forced, backend.choose("packed_linear", self.packed)
        )
        if choice == "reference":
            options = {"out_features": self.out_features, "activation": self.activation, "residual": residual}
            return packed_linear(x, self.packed, self.bias, **options)
        refuse_gradients("PackedLinear", x=x, residual=residual)
        run, number = torch.ops.lmvae_fast.packed_linear.default, ACTIVATIONS.index(self.activation)
        if x.dim() == 2:
            return run(x, self.packed, self.bias, residual, number, self.out_features)
        rows, added = x.reshape(-1, x.shape[-1]), None if residual is None else residual.reshape(-1, self.out_features)
        return run(rows, self.packed, self.bias, added, number, self.out_features).view(
            *x.shape[:-1], self.out_features
        )
