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

from . import backend

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
    for space, triton_key in targets.items():
        lib = _library(space)
        lib.define(schema, tags=tuple(tags))
        torch.library.register_fake(f"{space}::{name}", fake, lib=lib)
        if triton is not None:
            lib.impl(name, triton, triton_key)
        if backward is not None:

            def setup(ctx: Any, inputs: tuple, output: Any, space: str = space) -> None:
                ctx.primitives = getattr(torch.ops, space)
                ctx.set_materialize_grads(False)
                if setup_context is not None:
                    setup_context(ctx, inputs, output)

            torch.library.register_autograd(f"{space}::{name}", backward, setup_context=setup, lib=lib)
    return name


def primitives(choice: str, tensor: torch.Tensor) -> Any:
    """The torch.ops namespace in which backend `choice` runs a call on `tensor`'s device."""
    return getattr(torch.ops, backend.namespace(choice, tensor.device.type))


def refuse_vmap(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise TypeError where a tensor is batched by torch.func.vmap: a fallback would loop in silence and repeat noise."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and torch._C._functorch.is_batchedtensor(tensor):
            raise TypeError(f"{op} does not support torch.func.vmap: give it the batch as leading dimensions instead")


def autocast(device: str, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Floating tensors cast to the autocast dtype of `device` where autocast is on (fp64 is left alone, as torch does)."""
    if not torch.is_autocast_enabled(device):
        return tensors
    to = torch.get_autocast_dtype(device)
    return tuple(
        t.to(to) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
