"""coupling_flow, as users call it."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .checks import check_coupling_flow
from .spec import FlowParams


def coupling_flow(
    x: Tensor, params: FlowParams, *, cond: Tensor | None = None, inverse: bool = False, memory: str = "save"
) -> tuple[Tensor, Tensor]:
    """The flow y = T(x), or its inverse, and the log-determinant of the Jacobian of the map that was run.

    Differentiable once in x, cond and params.theta, in both directions; soft permutations are fixed.

    Args:
        x: [B, dim], dim 2 to 1024; fp32, fp16, bf16 or fp64, any strides, B may be 0.
        params: what the flow is (`params.spec`) and its numbers, in the dtype of x.
        cond: [B, cond_dim], concatenated to the input of every conditional coupling's subnets; None when cond_dim is 0.
        inverse: run T^-1.
        memory: "save" keeps every stage's activations for backward; "recompute" keeps only the output and rebuilds them
            by running the flow the other way: memory does not grow with depth, for one more forward's arithmetic.

    Returns:
        y: [B, dim] in the dtype of x. logdet: [B] in natural-log units, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: for types, dtypes, devices, ranks or sizes that do not fit, naming both.

    Source: FrEIA 0.2, AllInOneBlock, GLOWCouplingBlock, RNVPCouplingBlock and ActNorm; arXiv 1807.03039, 1605.08803.
    """
    check_coupling_flow(x, params, cond, memory)
    return reference.coupling_flow(x, params, cond=cond, inverse=inverse)
