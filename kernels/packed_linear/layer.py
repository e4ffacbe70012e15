"""A linear map whose weight stays: packed_linear, or packed_linear_int8, with its checks made once."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ..registration import refuse_gradients
from .int8 import QuantizedWeight, packed_linear_int8
from .op import packed_linear
from .reference import ACTIVATIONS, BYTE_STEP, STEP


class PackedLinear:
    """A linear map whose weight, bias and activation stay: `packed_linear` with its checks made once.

    A decoding step makes some fifty of these calls, beside which checking each of them anew shows.

    Args:
        packed: of `pack_weight` or `pack_gated`; or of `quantize_weight` or `quantize_gated`, which is `packed_linear_int8`.
        bias, out_features, activation: as for `packed_linear`.
        dtype: of what it is given, where the weight is of int8: that of the bias if there is one, else float32.
    """

    def __init__(
        self,
        packed: Tensor | QuantizedWeight,
        bias: Tensor | None = None,
        *,
        out_features: int,
        activation: str = "none",
        dtype: torch.dtype | None = None,
    ):
        self.packed, self.bias, self.out_features = packed, bias, out_features
        self.activation = activation
        if isinstance(packed, QuantizedWeight):
            self._op, self._parts = "packed_linear_int8", (packed.values, packed.scales, packed.totals)
            dtype = dtype or (torch.float32 if bias is None else bias.dtype)
            none = packed.scales.new_empty((0, packed.values.shape[1] * BYTE_STEP), dtype=dtype)
        else:
            self.packed = packed.contiguous()
            self._op, self._parts = "packed_linear", (self.packed,)
            none = packed.new_empty((0, packed.shape[1] * (STEP if packed.dtype == torch.bfloat16 else 1)))
        self.checked(none)
        self._run = getattr(torch.ops.lmvae_fast, self._op).default
        self._like = none  # of the dtype and on the device that the backend is chosen for
        self._choices: dict[str, str] = {}  # the backend, for each one that may be forced

    def checked(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As a call, with every check: raises what `packed_linear` raises."""
        options = {"out_features": self.out_features, "activation": self.activation, "residual": residual}
        if isinstance(self.packed, QuantizedWeight):
            return packed_linear_int8(x, self.packed, self.bias, **options)
        return packed_linear(x, self.packed, self.bias, **options)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[..., K]`` to ``[..., N]``, the residual ``[..., N]`` added. Not differentiable; the kernel looks at sizes and
        dtype. Raises ValueError for a tensor that requires a gradient where gradients are recorded, else as
        `packed_linear`, or RuntimeError from the kernel."""
        forced = backend.current()
        choice = self._choices.get(forced) or self._choices.setdefault(forced, backend.choose(self._op, self._like))
        if choice == "reference":
            return self.checked(x, residual)
        refuse_gradients("PackedLinear", x=x, residual=residual)
        number = ACTIVATIONS.index(self.activation)
        if x.dim() == 2:
            return self._run(x, *self._parts, self.bias, residual, number, self.out_features)
        rows, added = x.reshape(-1, x.shape[-1]), None if residual is None else residual.reshape(-1, self.out_features)
        return self._run(rows, *self._parts, self.bias, added, number, self.out_features).view(
            *x.shape[:-1], self.out_features
        )
