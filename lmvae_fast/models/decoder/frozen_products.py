"""Linear maps of a frozen decoder prepared once for both passes of a training step: the product, and its input gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lmvae_fast.kernels.packed_linear import PackedLinear, pack_weight, training_product
from lmvae_fast.models.decoder.large_pages import LargePages
from lmvae_fast.models.decoder.packed_products import linear_weight, require

#: Rows that a layout is chosen for: a hint, the same for every batch, so that sums have one order in all runs.
ROWS = 512
Product = Callable[[Tensor, Tensor | None], Tensor]  # rows, and what is added to the result or None


class FrozenLinear:
    """``x W^T + b`` over a weight that does not train, or over several with the same inputs, whose outputs then lie side by
    side. A second and a third copy of the weight are held, one for each pass.

    Args:
        parts: linear modules. pages: what the copies are put into where the layout is ours.
    """

    def __init__(self, pages: LargePages, *parts: nn.Module) -> None:
        weight = torch.cat([linear_weight(part) for part in parts]) if len(parts) > 1 else linear_weight(parts[0])
        biases = [part.bias.detach() for part in parts if isinstance(part.bias, Tensor)]
        require(len(biases) in (0, len(parts)), "a bias in some of the projections of one input")
        self.forward = _product(pages, weight, torch.cat(biases) if biases else None)
        self.backward = _product(pages, weight.t(), None)

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """``[T, inputs]`` to ``[T, outputs]``, ``added`` ``[T, outputs]`` to the result before it is rounded."""
        return self.forward(x, added)

    def gradient(self, grad: Tensor) -> Tensor:
        """By the inputs ``[T, inputs]``, given that of the outputs ``[T, outputs]``."""
        return self.backward(grad, None)


def _product(pages: LargePages, weight: Tensor, bias: Tensor | None) -> Product:
    by = training_product(weight.dtype)
    if by == "onednn":
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        plain, summed = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary

        def by_onednn(x: Tensor, added: Tensor | None) -> Tensor:
            if added is None:
                return plain(x, blocked, bias, "none", [], "")
            return summed(x, added, blocked, bias, "add")

        return by_onednn
    if by == "packed":
        return PackedLinear(pages.copy(pack_weight(weight)), bias, out_features=weight.shape[0])
    held = weight if weight.is_contiguous() else weight.t().contiguous().t()
    return lambda x, added: linear(x, held, bias) if added is None else linear(x, held, bias) + added
