"""coupling_flow: registration, autograd and the public function. The truth is reference.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..registration import define, primitives, reference_gradients, refuse_vmap, tangents
from . import reference
from .checks import MEMORY, check_coupling_flow
from .codes import KEEP_ACTIVATIONS, KEEP_NOTHING, KEEP_OUTPUT
from .plan import saved_columns
from .spec import FlowParams, spec_of_plan

_KEEP = dict(zip(MEMORY, (KEEP_ACTIVATIONS, KEEP_OUTPUT), strict=True))

# ---- primitives --------------------------------------------------------------------------------------------------------

_PLAN = "Tensor theta, Tensor constants, Tensor indices, int[] ints, float[] floats, bool inverse"


def _compute_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake_fwd(x, cond, theta, constants, indices, ints, floats, inverse, keep):
    wide = _compute_type(x)
    size = x.shape[0] * saved_columns(ints) if keep == KEEP_ACTIVATIONS else 0
    if keep == KEEP_OUTPUT and x.dtype != wide:
        size = x.shape[0] * x.shape[1]
    return x.new_empty(tuple(x.shape)), x.new_empty(x.shape[0], dtype=wide), x.new_empty(size, dtype=wide)


def _fake_bwd(dy, dlogdet, y, saved, cond, theta, constants, indices, ints, floats, inverse, batch, want_cond):
    dx = theta.new_empty((batch, ints[0]))
    return dx, theta.new_empty((batch, ints[1]) if want_cond else (0,)), torch.empty_like(theta)


def _triton_fwd(*args):
    from .triton import coupling_flow_fwd

    return coupling_flow_fwd(*args)


def _triton_bwd(*args):
    from .triton import coupling_flow_bwd

    return coupling_flow_bwd(*args)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, cond, theta, constants, indices, ctx.ints, ctx.floats, ctx.inverse, keep = inputs
    y, _, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.batch = x.shape[0]
    keep_y = keep == KEEP_OUTPUT
    ctx.save_for_backward(x, y if keep_y else None, saved, cond, theta, constants, indices)


def _backward(ctx: Any, dy: Tensor | None, dlogdet: Tensor | None, _: Tensor | None) -> tuple:
    x, y, saved, cond, *flats = ctx.saved_tensors
    if torch.is_grad_enabled():
        spec = spec_of_plan(tuple(ctx.ints), tuple(ctx.floats))

        def function(x, cond, theta):
            return reference.coupling_flow(x, FlowParams(spec, theta, *flats[1:]), cond=cond, inverse=ctx.inverse)

        needed = ctx.needs_input_grad[:3]
        return *reference_gradients(function, (x, cond, flats[0]), needed, (dy, dlogdet)), *(None,) * 6
    want_cond = cond is not None and ctx.needs_input_grad[1]
    dx, dcond, dtheta = ctx.primitives.coupling_flow_bwd(
        dy, dlogdet, y, saved, cond, *flats, ctx.ints, ctx.floats, ctx.inverse, ctx.batch, want_cond
    )
    return dx, dcond if want_cond else None, dtheta, None, None, None, None, None, None


define(
    "coupling_flow_bwd(Tensor? dy, Tensor? dlogdet, Tensor? y, Tensor saved, Tensor? cond, "
    f"{_PLAN}, SymInt batch, bool want_cond) -> (Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
    triton=_triton_bwd,
)
define(
    f"coupling_flow_fwd(Tensor x, Tensor? cond, {_PLAN}, int keep) -> (Tensor, Tensor, Tensor)",
    fake=_fake_fwd,
    triton=_triton_fwd,
    setup_context=_setup_context,
    backward=_backward,
)
backend.register(
    "coupling_flow",
    cpp=backend.Support(backend.FLOATS_AND_DOUBLE, ("coupling_flow_fwd", "coupling_flow_bwd")),
    triton=backend.Support(backend.FLOATS, ("coupling_flow_fwd", "coupling_flow_bwd")),
)

# ---- the public function -----------------------------------------------------------------------------------------------


def coupling_flow(
    x: Tensor, params: FlowParams, *, cond: Tensor | None = None, inverse: bool = False, memory: str = "save"
) -> tuple[Tensor, Tensor]:
    """The flow y = T(x), or its inverse, and the log-determinant of the Jacobian of the map that was run.

    Differentiable in x, cond and params.theta, in both directions; soft permutations are fixed. Second derivatives and
    forward-mode ones are plain torch's: right, not fast. Under autocast it computes in the dtype of params.theta (the
    inverse of a rounded flow is not its inverse).

    Args:
        x: [B, dim], dim 2 to 1024; fp32, fp16, bf16 or fp64, any strides, B may be 0.
        params: what the flow is (`params.spec`) and its numbers, in the dtype of x.
        cond: [B, cond_dim], concatenated to the input of every conditional coupling's subnets; None when cond_dim is 0.
        inverse: run T^-1.
        memory: "save" keeps every stage's activations for backward; "recompute" keeps only input and output and rebuilds
            them by running the flow the other way: memory does not grow with depth, for one more forward's arithmetic.

    Returns:
        y: [B, dim] in the dtype of x. logdet: [B] in natural-log units, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: for types, dtypes, devices, ranks or sizes that do not fit, naming both. BackendError when
            a forced backend cannot run.

    Source: FrEIA 0.2, AllInOneBlock, GLOWCouplingBlock, RNVPCouplingBlock and ActNorm; arXiv 1807.03039, 1605.08803.
    """
    refuse_vmap("coupling_flow", x, cond)
    if isinstance(x, Tensor) and x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        x = x.to(params.theta.dtype)
        cond = cond if cond is None else cond.to(params.theta.dtype)
    check_coupling_flow(x, params, cond, memory)
    choice = backend.choose("coupling_flow", x, **tangents(x, cond, params.theta))
    if choice == "reference":
        return reference.coupling_flow(x, params, cond=cond, inverse=inverse)
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or params.theta.requires_grad or (cond is not None and cond.requires_grad)
    )
    ints, floats = params.spec.plan
    run = primitives(choice, x).coupling_flow_fwd
    keep = _KEEP[memory] if needs_grad else KEEP_NOTHING
    y, logdet, _ = run(x, cond, params.theta, params.constants, params.indices, ints, floats, inverse, keep)
    return y, logdet
