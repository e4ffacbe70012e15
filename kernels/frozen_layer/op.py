"""frozen_layer: registration and the public functions. The truth is reference.py.

What stands between the products of a decoder layer whose weights do not train, forward and backward to its inputs: C++ for
CPUs in fp32 and bf16, Triton for CUDA in these and fp16. A caller that writes a layer out as one autograd function calls these;
they record nothing themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ..inplace import check_written, written
from ..registration import define, primitives, refuse_gradients, refuse_vmap
from . import reference
from .checks import check_kind, check_rows, check_stats, check_turns, check_vector
from .reference import ACTIVATIONS, GATED

# ---- primitives ------------------------------------------------------------------------------------------------------


def _dense_like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)  # whatever strides x has


def _fake_norm(x, weight, bias, eps, centred):
    return _dense_like(x), x.new_empty((x.shape[0], 2), dtype=torch.float32)


def _fake_add_norm(x, added, weight, bias, eps, centred):
    return _dense_like(x), *_fake_norm(x, weight, bias, eps, centred)


def _fake_norm_bwd(grad, x, stats, weight, added, centred):
    return _dense_like(x)


def _fake_activation(x, kind):
    return x.new_empty((x.shape[0], x.shape[1] // 2 if ACTIVATIONS[kind] in GATED else x.shape[1]))


def _fake_activation_bwd(grad, x, kind):
    return _dense_like(x)


def _fake_rotary(x, cos, sin, heads, back):
    return None


def _triton_norm(*args):
    from .triton import frozen_norm

    return frozen_norm(*args)


def _triton_add_norm(*args):
    from .triton import frozen_add_norm

    return frozen_add_norm(*args)


def _triton_norm_bwd(*args):
    from .triton import frozen_norm_bwd

    return frozen_norm_bwd(*args)


def _triton_activation(*args):
    from .triton import frozen_activation

    return frozen_activation(*args)


def _triton_activation_bwd(*args):
    from .triton import frozen_activation_bwd

    return frozen_activation_bwd(*args)


def _triton_rotary(*args):
    from .triton import frozen_rotary

    return frozen_rotary(*args)


define(
    "frozen_norm(Tensor x, Tensor weight, Tensor? bias, float eps, bool centred) -> (Tensor, Tensor)", fake=_fake_norm,
    triton=_triton_norm,
)  # fmt: skip
define(
    "frozen_add_norm(Tensor x, Tensor added, Tensor weight, Tensor? bias, float eps, bool centred) -> (Tensor, Tensor, Tensor)",
    fake=_fake_add_norm, triton=_triton_add_norm,
)  # fmt: skip
define(
    "frozen_norm_bwd(Tensor grad, Tensor x, Tensor stats, Tensor weight, Tensor? added, bool centred) -> Tensor",
    fake=_fake_norm_bwd,
    triton=_triton_norm_bwd,
)
define("frozen_activation(Tensor x, int kind) -> Tensor", fake=_fake_activation, triton=_triton_activation)
define(
    "frozen_activation_bwd(Tensor grad, Tensor x, int kind) -> Tensor", fake=_fake_activation_bwd,
    triton=_triton_activation_bwd,
)  # fmt: skip
define(
    "frozen_rotary(Tensor(a!) x, Tensor cos, Tensor sin, int heads, bool back) -> ()", fake=_fake_rotary,
    triton=_triton_rotary,
)  # fmt: skip
_PRIMITIVES = ("frozen_norm", "frozen_norm_bwd", "frozen_activation", "frozen_activation_bwd", "frozen_rotary")
backend.register(
    "frozen_layer", cpp=backend.Support((torch.float32, torch.bfloat16), _PRIMITIVES),
    triton=backend.Support(backend.FLOATS, (*_PRIMITIVES, "frozen_add_norm")),
)  # fmt: skip

# ---- the public functions --------------------------------------------------------------------------------------------


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float, centred: bool = True
) -> tuple[Tensor, Tensor]:
    """LayerNorm of rows, or RMSNorm. Not differentiable: `norm_gradient` is its gradient.

    Args:
        x: ``[T, N]``. weight, bias: ``[N]``, of x's dtype or fp32.
        eps: added to the variance. centred: whether the mean is taken off (LayerNorm).

    Returns:
        ``[T, N]`` in x's dtype, and ``[T, 2]`` fp32 for `norm_gradient`: means (0 for RMSNorm) and 1 / deviation.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit. BackendError: when a forced backend cannot run.
    """
    refuse_vmap("frozen_layer.norm", x, weight, bias)
    check_rows("x", x)
    check_vector("weight", weight, x)
    if bias is not None:
        check_vector("bias", bias, x)
    refuse_gradients("frozen_layer.norm", x=x, weight=weight, bias=bias)
    choice = backend.choose("frozen_layer", x)
    if choice == "reference":
        return reference.norm(x, weight, bias, eps, centred)
    return primitives(choice, x).frozen_norm(x, weight, bias, eps, centred)


def add_norm(
    x: Tensor, added: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float, centred: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """``x + added``, and what `norm` gives of this sum, which is rounded before it is normed. Not differentiable.

    Args:
        x, added: ``[T, N]``. The rest is `norm`'s.

    Returns:
        The sum ``[T, N]``, and `norm`'s two results. Raises as `norm`.
    """
    refuse_vmap("frozen_layer.add_norm", x, added, weight, bias)
    check_rows("x", x)
    check_rows("added", added, x, tuple(x.shape))
    check_vector("weight", weight, x)
    if bias is not None:
        check_vector("bias", bias, x)
    refuse_gradients("frozen_layer.add_norm", x=x, added=added, weight=weight, bias=bias)
    choice = backend.choose("frozen_layer", x)
    if choice == "triton":
        return primitives(choice, x).frozen_add_norm(x, added, weight, bias, eps, centred)
    total = x + added  # on a CPU the product that made x adds as it goes: nobody waits for this
    if choice == "reference":
        return total, *reference.norm(total, weight, bias, eps, centred)
    return total, *primitives(choice, x).frozen_norm(total, weight, bias, eps, centred)


def norm_gradient(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor, *, centred: bool = True, added: Tensor | None = None
) -> Tensor:
    """The gradient by x ``[T, N]`` of `norm`, given that of its output and its ``stats``; plus ``added`` ``[T, N]``, the
    gradient that reaches x beside the norm. Rounded once. Raises as `norm`."""
    refuse_vmap("frozen_layer.norm_gradient", grad, x, stats, weight, added)
    check_rows("x", x)
    check_vector("weight", weight, x)
    check_stats(stats, x)
    for name, tensor in (("grad", grad), ("added", added)):
        if tensor is not None:
            check_rows(name, tensor, x, tuple(x.shape))
    refuse_gradients("frozen_layer.norm_gradient", grad=grad, x=x, stats=stats, weight=weight, added=added)
    choice = backend.choose("frozen_layer", x)
    if choice == "reference":
        return reference.norm_gradient(grad, x, stats, weight, added, centred)
    return primitives(choice, x).frozen_norm_bwd(grad, x, stats, weight, added, centred)


def activation(x: Tensor, kind: str) -> Tensor:
    """``gelu_tanh`` of rows ``[T, N]``; of rows ``[gate, up]`` ``[T, 2 N]`` ``swiglu``, ``silu(gate) * up`` ``[T, N]``, or
    ``geglu_tanh``, ``gelu_tanh(gate) * up``. Not differentiable: `activation_gradient` is its gradient. Raises as `norm`."""
    refuse_vmap("frozen_layer.activation", x)
    check_rows("x", x)
    check_kind(kind, x)
    refuse_gradients("frozen_layer.activation", x=x)
    choice = backend.choose("frozen_layer", x)
    if choice == "reference":
        return reference.activation(x, kind)
    return primitives(choice, x).frozen_activation(x, ACTIVATIONS.index(kind))


def activation_gradient(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    """The gradient by x of `activation`, given that of its output ``[T, N]``. Raises as `norm`."""
    refuse_vmap("frozen_layer.activation_gradient", grad, x)
    check_rows("x", x)
    check_kind(kind, x)
    check_rows("grad", grad, x, (x.shape[0], x.shape[1] // 2 if kind in GATED else x.shape[1]))
    refuse_gradients("frozen_layer.activation_gradient", grad=grad, x=x)
    choice = backend.choose("frozen_layer", x)
    if choice == "reference":
        return reference.activation_gradient(grad, x, kind)
    return primitives(choice, x).frozen_activation_bwd(grad, x, ACTIVATIONS.index(kind))


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, *, heads: int, back: bool = False) -> Tensor:
    """Rotary positions in place. Not differentiable: its gradient is the same with ``back``.

    Args:
        x: ``[T, W]``, changed: the first ``heads * D`` columns are heads, whose halves are paired.
        cos, sin: ``[T, D]``, of x's dtype.
        back: by the transposed map.

    Returns x. Raises as `norm`, and for rows that share memory.
    """
    refuse_vmap("frozen_layer.rotate_", x, cos, sin)
    check_rows("x", x)
    check_turns(x, cos, sin, heads)
    refuse_gradients("frozen_layer.rotate_", x=x, cos=cos, sin=sin)
    check_written(x=x)
    choice = backend.choose("frozen_layer", x)
    if choice == "reference" or x.stride(1) != 1:
        return x.copy_(reference.rotate(x, cos, sin, heads, back))
    primitives(choice, x).frozen_rotary(x, cos, sin, heads, back)
    written(x)
    return x
