"""row_product: registration and the public function. The truth is reference.py.

No gradient: it serves decoding, where a few rows pass every weight of a decoder, each product waits for the one before, and
what a small kernel costs is mostly that it is a kernel. Triton for CUDA alone: on a CPU `packed_linear` is this.
"""

from __future__ import annotations

from torch import Tensor

from .. import backend
from ..frozen_layer.checks import check_rows
from ..frozen_layer.reference import ACTIVATIONS, GATED
from ..registration import define, primitives, refuse_gradients, refuse_vmap
from . import reference
from .checks import check_product
from .reference import Norm

#: Rows up to which one program's part of the weight is multiplied by all of them; of more, torch's product is the better one.
MOST_ROWS = 16

# ---- primitives ------------------------------------------------------------------------------------------------------


def _width(weight, activation):
    return weight.shape[0] // 2 if activation >= 0 and ACTIVATIONS[activation] in GATED else weight.shape[0]


def _fake(x, weight, bias, norm_weight, norm_bias, eps, centred, activation, added, settled):
    return x.new_empty((x.shape[0], _width(weight, activation)))


def _triton(*args):
    from .triton import row_product

    return row_product(*args)


define(
    "row_product(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps, bool centred, "
    "int activation, Tensor? added, bool settled) -> Tensor",
    fake=_fake,
    triton=_triton,
)
backend.register("row_product", triton=backend.Support(backend.FLOATS, ("row_product",)))

# ---- the public function ---------------------------------------------------------------------------------------------


def row_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    added: Tensor | None = None,
    settled: bool = False,
) -> Tensor:
    """``activation(norm(x) W^T + bias) + added`` for a few rows. Not differentiable.

    Args:
        x: ``[T, K]``, fp32, fp16 or bf16, any strides; made for T up to `MOST_ROWS`, right for any.
        weight: ``[N, K]`` in x's dtype; rows that lie in one piece are read where they are, others are copied first.
        bias: ``[N]``, of x's dtype or fp32.
        norm: of x's rows, rounded to x's dtype as a norm by itself would; None for none.
        activation: one of frozen_layer's, of the product before it is rounded; the gated ones halve its columns.
        added: ``[T, N or N / 2]`` in x's dtype, added before the result is rounded.
        settled: whether no kernel that still runs writes weight, bias or norm: on Hopper cards they are then read before the
            kernel that makes x has ended.

    Returns:
        ``[T, N]``, or ``[T, N / 2]`` behind a gated activation, in x's dtype.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit. BackendError: when a forced backend cannot run.
    """
    tensors = (x, weight, bias, added, *((norm.weight, norm.bias) if norm is not None else ()))
    refuse_vmap("row_product", *tensors)
    check_product(x, weight, bias, norm, activation)
    kind = -1 if activation is None else ACTIVATIONS.index(activation)
    if added is not None:
        check_rows("added", added, x, (x.shape[0], _width(weight, kind)))
    of_norm = (None, None, 0.0, False) if norm is None else norm
    vectors = {"norm.weight": of_norm[0], "norm.bias": of_norm[1]}
    refuse_gradients("row_product", x=x, weight=weight, bias=bias, added=added, **vectors)
    choice = backend.choose("row_product", x)
    if choice == "reference":
        return reference.row_product(x, weight, bias, norm, activation, added)
    return primitives(choice, x).row_product(x, weight, bias, *of_norm, kind, added, settled)
