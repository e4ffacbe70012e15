"""greedy_head: registration and the public functions. The truth is reference.py.

No gradient: they serve greedy decoding with a frozen head, whose weight is a third of what a small decoder reads per token.
`greedy_head` is for CPUs and fp32: the weight's bf16 copy is half as many bytes and is multiplied on the matrix units where
there are any; what that can be wrong by is bounded, and only entries that the bound cannot exclude are computed in fp32.
`greedy_product` is for CUDA: the product itself, whose logits are compared where they are made and never written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backend
from ..registration import define, primitives, refuse_gradients, refuse_vmap
from . import reference
from .checks import check_hidden, check_product, check_weight

# ---- primitives ------------------------------------------------------------------------------------------------------


def _fake(hidden, weight, panels, errors, norms):
    return hidden.new_empty((hidden.shape[0],), dtype=torch.int64)


define("greedy_head(Tensor hidden, Tensor weight, Tensor panels, Tensor errors, Tensor norms) -> Tensor", fake=_fake)
backend.register("greedy_head", cpp=backend.Support((torch.float32,), ("greedy_head",)))


def _fake_product(hidden, weight):
    rows = hidden.shape[0]
    return hidden.new_empty((rows,), dtype=torch.int64), hidden.new_empty((rows,), dtype=torch.float32)


def _triton_product(*args):
    from .triton import greedy_product

    return greedy_product(*args)


define("greedy_product(Tensor hidden, Tensor weight) -> (Tensor, Tensor)", fake=_fake_product, triton=_triton_product)
backend.register("greedy_product", triton=backend.Support(backend.FLOATS, ("greedy_product",)))

#: Rows up to which greedy_product reads the weight from memory once, by dtype: of more, a product that writes its logits does.
MOST_ROWS = {torch.float32: 16, torch.float16: 128, torch.bfloat16: 128}

# ---- the public functions --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GreedyHead:
    """A head's weight ``[V, K]`` (not copied) beside its rounded panels: see `reference.pack_panels`."""

    weight: Tensor
    panels: Tensor
    errors: Tensor
    norms: Tensor


def pack_head(weight: Tensor) -> GreedyHead:
    """Prepare the frozen head ``weight`` ``[V, K]`` fp32: half its bytes once more.

    Raises ValueError or TypeError for anything but a fp32 matrix with rows and columns.
    """
    check_weight(weight)
    weight = weight.detach().contiguous()
    return GreedyHead(weight, *reference.pack_panels(weight))


def greedy_head(hidden: Tensor, head: GreedyHead) -> Tensor:
    """The token of greatest logit ``hidden . weight[v]``, as an fp32 product has it. Not differentiable.

    Args:
        hidden: fp32 ``[..., K]``, any strides.
        head: of `pack_head`; its weight must not have changed since.

    Returns:
        ids int64 ``[...]``. Of equal logits the lowest id; a NaN counts as the largest, as in torch.argmax.

    Entries whose logits differ by less than fp32's rounding may come out in either order, as between any two fp32
    products. Raises ValueError or TypeError for shapes, dtypes or devices that do not fit, BackendError when a forced
    backend cannot run.
    """
    refuse_vmap("greedy_head", hidden)
    check_hidden(hidden, head.weight)
    refuse_gradients("greedy_head", hidden=hidden)
    rows = hidden.reshape(-1, hidden.shape[-1])
    choice = backend.choose("greedy_head", hidden)
    if choice == "reference":
        ids = reference.greedy_head(rows, head.weight)
    else:
        ids = primitives(choice, hidden).greedy_head(rows, head.weight, head.panels, head.errors, head.norms)
    return ids.view(hidden.shape[:-1])


def greedy_product(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The token of greatest logit, and that logit, where logits are the product with a head and nothing else. Not
    differentiable.

    Args:
        hidden: ``[..., K]``, fp32, fp16 or bf16, any strides.
        weight: ``[V, K]`` in the same dtype.

    Returns:
        ids int64 ``[...]`` and logits fp32 ``[...]``, summed in fp32 and rounded to hidden's dtype before they are compared: of
        equal ones the lowest id, a NaN counts as the largest.

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit, BackendError when a forced backend cannot
    run.
    """
    refuse_vmap("greedy_product", hidden, weight)
    check_product(hidden, weight)
    refuse_gradients("greedy_product", hidden=hidden, weight=weight)
    rows = hidden.reshape(-1, hidden.shape[-1])
    choice = backend.choose("greedy_product", hidden)
    if choice == "reference":
        ids, logits = reference.greedy_product(rows, weight)
    else:
        ids, logits = primitives(choice, hidden).greedy_product(rows, weight)
    return ids.view(hidden.shape[:-1]), logits.view(hidden.shape[:-1])
