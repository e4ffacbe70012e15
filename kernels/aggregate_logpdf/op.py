"""aggregate_logpdf: registration, autograd and the public function. The truth is reference.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..registration import define, primitives, refuse_vmap, tangents
from . import reference
from .checks import check_ids, check_offsets, check_tensors
from .groups import Sorted, sort_by_group

LARGEST_JOINT_DIM = 2048  # of the Triton form: a row of a joint density is held in registers

# ---- primitives ------------------------------------------------------------------------------------------------------

_INPUTS = "Tensor z, Tensor mu, Tensor logvar, Tensor? cu_z, Tensor? cu_posteriors, bool per_dim, float min_var"


def _fake_fwd(z, mu, logvar, cu_z, cu_posteriors, per_dim, min_var):
    shape = tuple(z.shape) if per_dim else tuple(z.shape[:2])
    return tuple(z.new_empty(shape, dtype=torch.promote_types(z.dtype, torch.float32)) for _ in range(2))


def _fake_bwd(grad, lse, z, mu, logvar, cu_z, cu_posteriors, per_dim, min_var, need_z, need_posteriors):
    posteriors = tuple(mu.shape) if need_posteriors else (0,)
    return z.new_empty(tuple(z.shape) if need_z else (0,)), mu.new_empty(posteriors), mu.new_empty(posteriors)


def _triton_fwd(*args):
    from .triton import aggregate_logpdf_fwd

    return aggregate_logpdf_fwd(*args)


def _triton_bwd(*args):
    from .triton import aggregate_logpdf_bwd

    return aggregate_logpdf_bwd(*args)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, mu, logvar, cu_z, cu_posteriors, *ctx.options = inputs
    ctx.save_for_backward(output[1], z, mu, logvar, cu_z, cu_posteriors)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple:
    rest = (None,) * 4
    if grad is None:
        return (None,) * 3 + rest
    need_z, need_mu, need_logvar = ctx.needs_input_grad[:3]
    dz, dmu, dlogvar = ctx.primitives.aggregate_logpdf_bwd(
        grad, *ctx.saved_tensors, *ctx.options, need_z, need_mu or need_logvar
    )
    return dz if need_z else None, dmu if need_mu else None, dlogvar if need_logvar else None, *rest


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple:
    raise RuntimeError("aggregate_logpdf has no second derivative; backend('reference') has one")


define(
    f"aggregate_logpdf_bwd(Tensor grad, Tensor lse, {_INPUTS}, bool need_z, bool need_posteriors) -> "
    "(Tensor dz, Tensor dmu, Tensor dlogvar)",
    fake=_fake_bwd,
    triton=_triton_bwd,
    backward=_no_second_derivative,
)
define(
    f"aggregate_logpdf_fwd({_INPUTS}) -> (Tensor logq, Tensor lse)",
    fake=_fake_fwd,
    triton=_triton_fwd,
    setup_context=_setup_context,
    backward=_backward,
)


def _triton_can(facts: Mapping[str, Any]) -> str | None:
    if facts.get("wide_joint", False):
        return f"triton's joint densities have at most {LARGEST_JOINT_DIM} dimensions"
    return None


_PRIMITIVES = ("aggregate_logpdf_fwd", "aggregate_logpdf_bwd")
backend.register(
    "aggregate_logpdf",
    cpp=backend.Support(backend.FLOATS_AND_DOUBLE, _PRIMITIVES),
    triton=backend.Support(backend.FLOATS, _PRIMITIVES, check=_triton_can),
)


# ---- the public function ---------------------------------------------------------------------------------------------


def _by_ids(z: Tensor, mu: Tensor, groups: Tensor | tuple[Tensor, Tensor]) -> Sorted:
    z_ids, posterior_ids = groups if isinstance(groups, (tuple, list)) else (groups, groups)
    check_ids("ids of the posteriors", posterior_ids, mu.shape[0], "row of mu", mu.device)
    check_ids("ids of z", z_ids, z.shape[-2], "row of z", mu.device)
    found = sort_by_group(z_ids, posterior_ids)
    if mu.device.type == "cpu" and not torch.compiler.is_compiling():
        known = int(found.cu_z[-2])
        if known < z_ids.shape[0]:
            stray = int(z_ids[found.z_order[known]])
            raise ValueError(
                f"groups: {z_ids.shape[0] - known} rows of z have an id that no posterior has (such as {stray})"
            )
    return found


def aggregate_logpdf(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    per_dim: bool,
    groups: Tensor | tuple[Tensor, Tensor] | None = None,
    cu_z: Tensor | None = None,
    cu_posteriors: Tensor | None = None,
    min_var: float = 0.0,
) -> Tensor:
    """ln of the mean, over the posteriors of z's group, of their Gaussian densities at z; differentiable in all three.

    With lp(z; mu, lv) = -ln(2 pi) / 2 - lv / 2 - (z - mu)^2 / (2 e^lv + min_var) of one dimension and n over the N_g
    posteriors of the group that row k belongs to,

        per_dim:  logq[k, d] = ln (1 / N_g) sum_n exp lp(z[k, d]; mu[n, d], logvar[n, d])        (marginal aggregates)
        else:     logq[k]    = ln (1 / N_g) sum_n exp sum_d lp(z[k, d]; mu[n, d], logvar[n, d])  (the joint aggregate)

    No tensor of all rows by all posteriors (by dimension) exists, forward or backward: memory is that of the arguments.

    Args:
        z: [..., K, D] points; fp32, fp16, bf16 or fp64, any strides, no elements allowed. Leading dimensions are samples
            that share the grouping of the K rows, as `posterior_sample(num_samples=M)` gives them: [M, N, D].
        mu, logvar: [N, D] means and log-variances, in z's dtype.
        per_dim: marginal aggregates of each dimension, or the joint one.
        groups: None (all rows and posteriors are one group, unless offsets are given), the ids int32/int64 [N] of the
            posteriors' groups when row n of z is a sample of posterior n (K = N), or a pair (ids of z [K], ids of the
            posteriors [N]). Any numbers in any order: they are sorted, which costs copies of z, mu and logvar.
        cu_z, cu_posteriors: the fast form, for rows that lie group by group: int32 [G + 1], group g holds rows cu_z[g] to
            cu_z[g + 1] of z and posteriors cu_posteriors[g] to cu_posteriors[g + 1]. Without cu_z it equals
            cu_posteriors (K = N). Groups may be empty, and may have posteriors without a row of z.
        min_var: added to 2 e^logvar under the squared distance, the normaliser left as it is: 1e-4 is the density of the
            public code of CVAE with G-Skip; 0 the Gaussian's.

    Returns:
        logq, [..., K, D] (per_dim) or [..., K], in nats; fp32 (fp64 for fp64). Half types are computed in fp32 throughout.
        Gradients are deterministic. Inf and NaN pass through as in torch, and never into another group.

    Raises:
        ValueError, TypeError: naming the argument and both sizes; for a group with rows of z and no posterior too, where
            offsets lie on the CPU (on CUDA that would wait for the device: its logq is NaN there).
        BackendError: when a forced backend cannot run. RuntimeError: when a second derivative is asked for.

    Sources: marginal aggregates, Zhang et al. 2022 (DG-VAE) and CVAE with G-Skip; the joint one, Hoffman & Johnson 2016.
    """
    check_tensors(z, mu, logvar, min_var)
    by_offsets = cu_z is not None or cu_posteriors is not None
    if by_offsets and groups is not None:
        raise ValueError("groups (ids) and cu_z, cu_posteriors (offsets) are two forms of one thing: give one of them")
    if cu_posteriors is None and cu_z is not None:
        raise ValueError("cu_z was given without cu_posteriors")
    if cu_z is None and (by_offsets or isinstance(groups, Tensor)) and z.shape[-2] != mu.shape[0]:
        raise ValueError(
            f"z {list(z.shape)} has {z.shape[-2]} rows and mu {list(mu.shape)} {mu.shape[0]}: rows that are not samples of "
            f"the posteriors need {'cu_z' if by_offsets else 'groups=(ids of z, ids of the posteriors)'}"
        )
    refuse_vmap("aggregate_logpdf", z, mu, logvar)
    z_place = None
    if groups is not None:
        z_order, z_place, order, cu_z, cu_posteriors = _by_ids(z, mu, groups)
        z, mu, logvar = z.index_select(-2, z_order), mu.index_select(0, order), logvar.index_select(0, order)
    elif cu_posteriors is not None and cu_z is None:
        cu_z = cu_posteriors
    if cu_z is not None and cu_posteriors is not None:
        check_offsets(cu_z, cu_posteriors, z.shape[-2], mu.shape[0], mu.device)
    lead = z.shape[:-2]
    if z.dim() != 3:
        z = z.reshape(lead.numel(), *z.shape[-2:])
    choice = backend.choose(
        "aggregate_logpdf", mu, wide_joint=not per_dim and mu.shape[1] > LARGEST_JOINT_DIM, **tangents(z, mu, logvar)
    )
    if choice == "reference":
        logq = reference.aggregate_logpdf(z, mu, logvar, cu_z, cu_posteriors, per_dim, float(min_var))
    else:
        run = primitives(choice, mu).aggregate_logpdf_fwd
        logq = run(z, mu, logvar, cu_z, cu_posteriors, bool(per_dim), float(min_var))[0]
    if z_place is not None:
        logq = logq.index_select(1, z_place)
    return logq if len(lead) == 1 else logq.reshape(*lead, *logq.shape[1:])
