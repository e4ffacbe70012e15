"""Linear maps of a frozen decoder prepared once for both passes of a training step: the product, and its input gradient.

Low-rank adapters (LoRA) beside such a map train: their products are added, and their gradients are given with the inputs'.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lmvae_fast.kernels.backend import choose
from lmvae_fast.kernels.packed_linear import PackedLinear, pack_weight, training_product
from lmvae_fast.models.decoder.large_pages import LargePages
from lmvae_fast.models.decoder.linear_weights import linear_weight, require
from lmvae_fast.models.decoder.low_rank import LowRank, adapter_of, is_adapted, without_adapter

#: Rows that a layout is chosen for: a hint, the same for every batch, so that sums have one order in all runs.
ROWS = 512
Product = Callable[[Tensor, Tensor | None], Tensor]  # rows, and what is added to the result or None


class FrozenLinear:
    """``x W^T + b`` over a weight that does not train, or over several with the same inputs, whose outputs then lie side by
    side. On a CPU a second and a third copy of the weight are held, one for each pass; on CUDA one, of several.

    Args:
        parts: linear modules, adapters beside them or not. pages: what the copies are put into where the layout is ours.

    Attributes:
        adapters: what trains beside the weights. weight, bias: ``[outputs, inputs]`` and ``[outputs]`` or None.
    """

    def __init__(self, pages: LargePages, *parts: nn.Module) -> None:
        bases = [without_adapter(part) for part in parts]
        weights = [linear_weight(base) for base in bases]
        biases = [base.bias.detach().to(weights[0].dtype) for base in bases if isinstance(base.bias, Tensor)]
        require(len(biases) in (0, len(bases)), "a bias in some of the projections of one input")
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        bias = torch.cat(biases) if biases else None
        self.weight, self.bias = weight, bias
        #: Whether the product itself adds; where it does not, the norm that follows does (Norm.of_sum).
        self.sums = weight.device.type == "cpu" and choose("frozen_layer", weight) != "triton"
        self.forward = _product(pages, weight, bias) if self.sums else _plain_product(weight, bias)
        self.backward = _product(pages, weight.t(), None) if self.sums else _plain_product(weight.t(), None)
        self.adapters: list[LowRank] = []
        start = 0
        for part, own in zip(parts, weights, strict=True):
            columns, start = slice(start, start + own.shape[0]), start + own.shape[0]
            if is_adapted(part):
                self.adapters.append(adapter_of(part, columns))

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """``[T, inputs]`` to ``[T, outputs]``, ``added`` ``[T, outputs]`` to the result before it is rounded."""
        out = self.forward(x, added)
        for adapter in self.adapters:
            adapter.add(x, out)
        return out

    def gradient(self, grad: Tensor, inputs: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """By the inputs ``[T, inputs]``, given that of the outputs ``[T, outputs]``; and by all that trains beside the weights.

        inputs: gives the inputs, which are asked for only where something trains.
        """
        by_x, found = self.backward(grad, None), []
        if self.adapters:
            x = inputs()
            for adapter in self.adapters:
                found += adapter.gradients(grad, x, by_x)
        return by_x, found

    def trained(self) -> list[Tensor]:
        """What trains beside the weights, in the order of its gradients."""
        return [part for adapter in self.adapters for part in (adapter.down, adapter.up)]


def _plain_product(weight: Tensor, bias: Tensor | None) -> Product:
    """torch's own, which on CUDA takes any layout of the weight: nothing is copied."""
    return lambda x, added: linear(x, weight, bias) if added is None else linear(x, weight, bias).add_(added)


class OneDnnLinear:
    """oneDNN's product over a weight ``[outputs, inputs]`` that it has put in an order of its own.

    Attributes:
        weight: in that order. bias: ``[outputs]`` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        self.bias = bias
        self._plain, self._summed = (
            torch.ops.mkldnn._linear_pointwise.default,
            torch.ops.mkldnn._linear_pointwise.binary,
        )

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        if added is None:
            return self._plain(x, self.weight, self.bias, "none", [], "")
        return self._summed(x, added, self.weight, self.bias, "add")


def _product(pages: LargePages, weight: Tensor, bias: Tensor | None) -> Product:
    by = training_product(weight.dtype)
    if by == "onednn":
        return OneDnnLinear(weight, bias)
    if by == "packed":
        return PackedLinear(pages.copy(pack_weight(weight)), bias, out_features=weight.shape[0])
    held = weight if weight.is_contiguous() else weight.t().contiguous().t()
    return lambda x, added: linear(x, held, bias) if added is None else linear(x, held, bias) + added
