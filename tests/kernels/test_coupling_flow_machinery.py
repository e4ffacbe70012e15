"""coupling_flow inside torch's machinery, and bad input."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.backend import BackendError, backend
from lmvae_fast.kernels.coupling_flow import Coupling, FlowParams, FlowSpec, Stage, Subnet, coupling_flow
from tests.kernels.test_coupling_flow import (
    MEMORY,
    SPECS,
    Bound,
)

from .common import (
    assert_fullgraph_equal,
    opcheck,
    raises_naming,
    require,
)

# ---- torch's machinery -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", MEMORY)
def test_fullgraph_compile_equals_eager(memory):
    require("coupling_flow", "cpp")
    bound = Bound(SPECS["rnvp, sigmoid clamp, conditional"])
    assert_fullgraph_equal(bound.op, bound.inputs(6), memory=memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    require("coupling_flow", "cpp", dtype)
    bound = Bound(SPECS["allinone, conditional"], dtype)
    x, theta, cond = bound.inputs(5)
    ints, floats = bound.spec.plan
    for keep in (0, 1, 2):
        args = (
            x.requires_grad_(),
            cond,
            theta.requires_grad_(),
            bound.constants,
            bound.indices,
            ints,
            floats,
            False,
            keep,
        )
        tests = ("test_schema", "test_faketensor") if keep == 0 else None  # nothing kept: no backward
        opcheck("coupling_flow_fwd", args, **({"test_utils": tests} if tests else {}))
    y, _, saved = torch.ops.lmvae_fast.coupling_flow_fwd(
        *(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    )
    flats = (theta.detach(), bound.constants, bound.indices, ints, floats, False)
    opcheck("coupling_flow_bwd", (torch.ones_like(y), None, y, saved, cond, *flats, 5, True))


def test_autocast_computes_in_the_dtype_of_theta():
    require("coupling_flow", "cpp")
    bound = Bound(SPECS["allinone"])
    x, theta = bound.inputs(4)
    with torch.autocast("cpu", torch.bfloat16):
        y, logdet = bound.op(x.bfloat16(), theta)
    expected = bound.op(x.bfloat16().float(), theta)
    torch.testing.assert_close((y, logdet), expected, rtol=0, atol=0)


def test_vmap_is_refused():
    bound = Bound(SPECS["allinone"])
    x, theta = bound.inputs(4)
    with raises_naming(TypeError, "vmap"):
        torch.func.vmap(lambda row: bound.op(row[None], theta)[0])(x)


def test_forced_backend_that_cannot_run_says_why():
    bound = Bound(SPECS["allinone"])
    with backend("cuda"), pytest.raises(BackendError, match="cuda"):
        bound.op(*bound.inputs(2))


# ---- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_named_with_both_sizes():
    bound = Bound(SPECS["allinone, conditional"])
    x, theta, cond = bound.inputs(4)
    params = bound.params(theta)
    with raises_naming(ValueError, "x", 8, 9):
        coupling_flow(x[:, :8], params, cond=cond)
    with raises_naming(ValueError, "x", "rank 2"):
        coupling_flow(x[0], params, cond=cond)
    with raises_naming(TypeError, "x", "float64", "float32"):
        coupling_flow(x.double(), params, cond=cond)
    with raises_naming(TypeError, "x", "int64"):
        coupling_flow(x.long(), params, cond=cond)
    with raises_naming(ValueError, "x", "meta", "cpu"):
        coupling_flow(x.to("meta"), params, cond=cond)
    with raises_naming(ValueError, "cond", 5):
        coupling_flow(x, params)
    with raises_naming(ValueError, "cond", 4, 5):
        coupling_flow(x, params, cond=cond[:, :4])
    with raises_naming(ValueError, "cond", 3, 4):
        coupling_flow(x, params, cond=cond[:3])
    with raises_naming(TypeError, "cond", "float64"):
        coupling_flow(x, params, cond=cond.double())
    with raises_naming(ValueError, "memory", "none"):
        coupling_flow(x, params, cond=cond, memory="none")
    with raises_naming(ValueError, "theta", theta.numel(), theta.numel() - 1):
        coupling_flow(x, FlowParams(bound.spec, theta[1:], bound.constants, bound.indices), cond=cond)
    with raises_naming(TypeError, "indices", "int64"):
        coupling_flow(x, FlowParams(bound.spec, theta, bound.constants, bound.indices.long()), cond=cond)
    with raises_naming(TypeError, "params"):
        coupling_flow(x, theta, cond=cond)


def test_bad_specs_are_refused():
    net = (Subnet((4,)),)
    for clamp in (0.0, -1.0, float("nan"), float("inf")):
        with raises_naming(ValueError, "clamp", clamp):
            Coupling(2, 1, net, clamp)
    for make, words in (
        (lambda: FlowSpec(1, 0, ()), ("dim", 1)),
        (lambda: FlowSpec(1025, 0, ()), ("dim", 1025, 1024)),
        (lambda: FlowSpec(4, -1, ()), ("cond_dim", -1)),
        (lambda: FlowSpec(4, 0, (Stage(Coupling(4, 1, net)),)), ("split", 4)),
        (lambda: FlowSpec(4, 0, (Stage(Coupling(2, 1, net, conditional=True)),)), ("conditional", "cond_dim")),
        (lambda: Coupling(2, 2, net), ("active", 2)),
        (lambda: Coupling(2, 1, net * 3), ("subnets", 3)),
        (lambda: Coupling(2, 1, net, gain=0.0), ("gain", 0.0)),
        (lambda: Coupling(2, 1, net, squash="relu"), ("squash", "relu")),
        (lambda: Subnet((0,)), ("hidden", 0)),
        (lambda: Subnet((4,), "tanh"), ("activation", "tanh")),
        (lambda: Stage(affine="relu"), ("affine", "relu")),
        (lambda: Stage(permutation="random"), ("permutation", "random")),
    ):
        with raises_naming(ValueError, *words):
            make()


def test_a_corrupt_permutation_never_reaches_memory():
    require("coupling_flow", "cpp")
    bound = Bound(SPECS["allinone"])
    x, theta = bound.inputs(2)
    for value in (-1, 12, 2**31 - 1):
        indices = bound.indices.clone()
        indices[5] = value
        with backend("cpp"), pytest.raises(RuntimeError, match="index outside"):
            coupling_flow(x, FlowParams(bound.spec, theta, bound.constants, indices))
