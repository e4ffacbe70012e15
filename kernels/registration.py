"""Registration of an op's primitives with torch.library: schema, fake, Triton launcher and autograd, each given once.

Autograd formulas are registered from Python for all backends alike, so they exist without the C++ extension. Measured on the
2-core development machine at [512, 128]: `register_autograd` costs about 20 us per forward+backward more than a bare
`torch.autograd.Function` (64 against 42 us, kernels left empty), and eager torch needs 600 us for the posterior. Only the
posterior has its formula a second time in C++, for CPU tensors (csrc/cpu/posterior.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backend, graph_floats

_libraries: dict[str, torch.library.Library] = {}


def _library(space: str) -> torch.library.Library:
    # FRAGMENT, not DEF: csrc/ops.cpp adds to the same namespace, in whichever order the two are loaded.
    if space not in _libraries:
        _libraries[space] = torch.library.Library(space, "FRAGMENT")
    return _libraries[space]


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> str:
    """Define `name(arguments) -> results` and return its name.

    fake: shapes and dtypes of the results, given fake tensors. triton: the launcher (import triton inside it: the schema
    must exist where triton does not). backward, setup_context: as for torch.library.register_autograd; `backward` gets
    `ctx.primitives`, the namespace to call the backward primitive in. The C++ implementation for CPU is found by name
    (TORCH_LIBRARY_IMPL(lmvae_fast, CPU, m)).
    """
    name = schema.split("(", 1)[0].strip()
    targets = {"lmvae_fast": "CUDA"}
    if backend.INTERPRET and triton is not None:
        targets["lmvae_fast_interpret"] = "CPU"
    places = graph_floats.floats(schema)
    for space, triton_key in targets.items():
        lib = _library(space)
        lib.define(schema, tags=tuple(tags))
        if triton is not None:
            lib.impl(name, triton, triton_key)
        names = {name: getattr(torch.ops, space)}
        if places:
            lib.define(graph_floats.twin_schema(schema), tags=tuple(tags))
            twin = graph_floats.with_numbers(space, name, places)
            lib.impl(f"{name}_numbers", twin, "CompositeExplicitAutograd")
            names[f"{name}_numbers"] = graph_floats.twins(space)
        for each, primitives_of_backward in names.items():
            torch.library.register_fake(f"{space}::{each}", fake, lib=lib)
            if backward is not None:
                setup = _setup(setup_context, primitives_of_backward)
                torch.library.register_autograd(f"{space}::{each}", backward, setup_context=setup, lib=lib)
        graph_floats.enter(space, name, places)
    return name


def _setup(setup_context: Callable[..., None] | None, primitives_of_backward: Any) -> Callable[..., None]:
    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.primitives = primitives_of_backward
        ctx.set_materialize_grads(False)
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    return setup


def define_plain(schema: str, function: Callable[..., Any]) -> None:
    """Define `name(arguments) -> results` as plain torch, for every device: C++ calls by name what Python has written.

    Differentiable as often as what it is made of.
    """
    lib = _library("lmvae_fast")
    lib.define(schema)
    lib.impl(schema.split("(", 1)[0].strip(), function, "CompositeImplicitAutograd")


def primitives(choice: str, tensor: torch.Tensor) -> Any:
    """The torch.ops namespace in which backend `choice` runs a call on `tensor`'s device; what stands for it in a graph."""
    space = backend.namespace(choice, tensor.device.type)
    return graph_floats.in_graphs(space) if torch.compiler.is_compiling() else getattr(torch.ops, space)


def refuse_vmap(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise TypeError where a tensor is batched by torch.func.vmap: a fallback would loop in silence and repeat noise."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and torch._C._functorch.is_batchedtensor(tensor):
            raise TypeError(f"{op} does not support torch.func.vmap: give it the batch as leading dimensions instead")


def tangents(*tensors: Tensor | None) -> dict[str, bool]:
    """For `backend.choose`: says so where a tensor carries a tangent (forward-mode AD), which our kernels would lose."""
    if forward_ad._current_level < 0:
        return {}
    return {"forward_ad": True} if _has_tangent(tensors) else {}


def _has_tangent(tensors: Sequence[Tensor | None]) -> bool:
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def refuse_gradients(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError where an op without derivatives gets a tensor that wants one: the graph would end there unsaid."""
    graded, dual = torch.is_grad_enabled(), forward_ad._current_level >= 0
    if not (graded or dual):
        return
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if graded and tensor.requires_grad:
            raise ValueError(
                f"{op} has no gradient: {name} must not require one (detach it, or call {op} under torch.no_grad())"
            )
        if dual and _has_tangent((tensor,)):
            raise ValueError(f"{op} has no derivative: {name} must not carry a tangent of forward-mode AD")


def reference_gradients(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of plain torch's `function(*inputs)`, recorded so that they can be differentiated again.

    What an op's backward gives under ``create_graph``, in place of its own kernel, whose result is a number to autograd.

    Args:
        function: the op's reference, as a function of its differentiable inputs only; one output or a tuple.
        inputs: those inputs, as autograd saved them. needed: which of them get a gradient; the others give None.
        grads: of the outputs, None for what was not used.
    """
    with torch.enable_grad():
        leaves = [
            x if x is None or not need else x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            for x, need in zip(inputs, needed, strict=True)
        ]
        outputs = function(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        wanted = [x for x, need in zip(leaves, needed, strict=True) if need and x is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in used], wanted, [g for _, g in used], create_graph=True, materialize_grads=True
            )
            if used and wanted
            else [torch.zeros_like(x) for x in wanted]
        )
    return tuple(next(found) if need and x is not None else None for x, need in zip(leaves, needed, strict=True))


def autocast(device: str, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Floating tensors cast to the autocast dtype of `device` where autocast is on (fp64 is left alone, as torch does)."""
    if not torch.is_autocast_enabled(device):
        return tensors
    to = torch.get_autocast_dtype(device)
    return tuple(
        t.to(to) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
