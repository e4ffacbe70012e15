"""coupling_flow against its reference: values, gradients, both directions, both memory modes, layouts, bad input.

FrEIA itself is the oracle in tests/integrations/test_freia.py; here plain torch in fp64 is.
"""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.backend import backend
from lmvae_fast.kernels.coupling_flow import Coupling, FlowParams, FlowSpec, Stage, Subnet, coupling_flow, reference
from lmvae_fast.kernels.coupling_flow.plan import saved_columns
from lmvae_fast.models.flow import CouplingFlow

from .common import (
    LAYOUTS,
    ODD_SIZES,
    GuardedAllocations,
    assert_deterministic,
    assert_int64_addresses,
    assert_op_within_error_rule,
    lay_out,
    on_backend,
    require,
    run_with_grads,
)

FAST = ("cpp", "triton")
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
DIRECTIONS = (False, True)
MEMORY = ("save", "recompute")


def allinone(dim, hidden=(24,), blocks=2, cond_dim=0, activation="relu", permutation="hard", affine="softplus"):
    split = dim - dim // 2
    net = Subnet(hidden, activation)
    block = Stage(Coupling(split, 1, (net,), 2.0, "tanh", 0.1, cond_dim > 0), affine, permutation)
    return FlowSpec(dim, cond_dim, (block,) * blocks)


def glow(dim, hidden=(24,), blocks=2, cond_dim=0, squash="atan", nets=1, split=None, activation="relu"):
    split = split or dim - dim // 2
    net = (Subnet(hidden, activation),) * nets
    first, second = (Coupling(split, i, net, 1.5, squash, 1.0, cond_dim > 0) for i in (0, 1))
    return FlowSpec(dim, cond_dim, (Stage(first), Stage(second, "exp", "hard")) * blocks)


def one_sided(dim, permutation, blocks=2, cond_dim=0):
    """The second half conditions, the first is transformed, nothing bounds the scale; then permutation, then ActNorm."""
    coupling = Coupling(dim - dim // 2, 0, (Subnet((24,)),), 1.0, "none", 1.0, cond_dim > 0)
    return FlowSpec(dim, cond_dim, (Stage(coupling, None, permutation), Stage(None, "exp")) * blocks)


# One spec per thing that a kernel does differently.
SPECS = {
    "allinone": allinone(12),
    "allinone, soft": allinone(11, permutation="soft"),
    "allinone, conditional": allinone(9, cond_dim=5),
    "two hidden layers, gelu": allinone(10, hidden=(20, 33), activation="gelu"),
    "three hidden layers, silu, conditional": allinone(7, hidden=(5, 17, 9), activation="silu", cond_dim=3),
    "linear subnets": allinone(8, hidden=()),
    "glow": glow(12),
    "glow, uneven split, tanh": glow(10, split=3, squash="tanh"),
    "rnvp, sigmoid clamp, conditional": glow(9, nets=2, squash="sigmoid", cond_dim=2),
    "rnvp, gelu": glow(6, nets=2, activation="gelu"),
    "sigmoid scale": allinone(6, affine="sigmoid"),
    "no clamp": one_sided(13, "hard"),
    "no clamp, soft, conditional": one_sided(8, "soft", cond_dim=3),
    "exp scale alone, permutations alone": FlowSpec(
        7,
        0,
        (Stage(None, "exp"), Stage(None, None, "hard"), Stage(None, None, "soft"), Stage(None, "softplus", "hard")),
    ),
}


class Bound:
    """A spec with numbers: calls of (x, theta[, cond]) for the op and for the reference, and matching inputs."""

    def __init__(self, spec: FlowSpec, dtype=torch.float32, spread: float = 0.3):
        self.spec = spec
        flow = CouplingFlow.from_spec(spec).double()
        flow._reset(None)  # again, so that soft permutations and their inverses are exact to fp64
        with torch.no_grad():
            flow.theta.add_(spread * torch.randn_like(flow.theta) * (flow.theta.abs() < 0.5))
        self.theta = flow.theta.detach().to(dtype)
        self.constants, self.indices = flow.constants.to(dtype), flow.indices

    def inputs(self, batch: int, layout: str = "dense") -> list[torch.Tensor]:
        dtype = self.theta.dtype
        tensors = [lay_out(torch.randn(batch, self.spec.dim).to(dtype), layout), self.theta]
        if self.spec.cond_dim:
            tensors.append(lay_out(torch.randn(batch, self.spec.cond_dim).to(dtype), layout))
        return tensors

    def params(self, theta: torch.Tensor) -> FlowParams:
        return FlowParams(self.spec, theta, self.constants.to(theta.dtype), self.indices)

    def op(self, x, theta, cond=None, *, inverse=False, memory="save"):
        return coupling_flow(x, self.params(theta), cond=cond, inverse=inverse, memory=memory)

    def plain(self, x, theta, cond=None, *, inverse=False, memory="save"):
        return reference.coupling_flow(x, self.params(theta), cond=cond, inverse=inverse)

    @property
    def grad_names(self) -> tuple[str, ...]:
        return ("x", "theta", "cond") if self.spec.cond_dim else ("x", "theta")


def check(name: str, bound: Bound, inputs: list[torch.Tensor], **kwargs) -> None:
    assert_op_within_error_rule(
        on_backend(bound.op, name), bound.plain, inputs, ("y", "logdet"), bound.grad_names, **kwargs
    )


# ---- values and gradients ----------------------------------------------------------------------------------------------


# memory="recompute" rebuilds the states with the rounding errors of one more pass, which a badly conditioned flow enlarges
# (docs/kernels/coupling_flow.md): its gradients meet the rule on flows near their initialisation, like those at the start
# of training, and stay within the rms rule on the others (test_recompute_far_from_initialisation).
SPREAD = {"save": 0.1, "recompute": 0.02}


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("inverse", DIRECTIONS)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("spec", SPECS)
def test_error_rule_for_every_kind_of_stage(name, spec, inverse, memory):
    require("coupling_flow", name)
    if name == "triton" and inverse != (memory == "recompute"):
        pytest.skip("interpreted Triton is slow: each direction in one memory mode, the other pairs in half types")
    bound = Bound(SPECS[spec], spread=SPREAD[memory])
    check(name, bound, bound.inputs(19), inverse=inverse, memory=memory)


@pytest.mark.parametrize("inverse", DIRECTIONS)
def test_recompute_far_from_initialisation(inverse):
    require("coupling_flow", "cpp")
    for name, spec in SPECS.items():
        # without a clamp, values there are 1e49, which fp32 does not hold
        bound = Bound(spec, spread=SPREAD["recompute"]) if name.startswith("no clamp") else Bound(spec)
        inputs = bound.inputs(19)
        outputs, grads, weights = run_with_grads(
            on_backend(bound.op, "cpp"), inputs, inverse=inverse, memory="recompute"
        )
        truth, truth_grads, _ = run_with_grads(bound.plain, [t.double() for t in inputs], weights, inverse=inverse)
        for ours, exact in zip([*outputs, *grads], [*truth, *truth_grads], strict=True):
            ratio = (ours.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            assert ratio < 1e-4


def test_a_flow_without_stages_is_the_identity():
    require("coupling_flow", "cpp")
    bound = Bound(FlowSpec(4, 0, ()))
    x, theta = bound.inputs(3)
    for memory in MEMORY:
        (y, logdet), (dx, _), weights = run_with_grads(on_backend(bound.op, "cpp"), [x, theta], memory=memory)
        assert torch.equal(y, x)
        assert (logdet == 0).all()
        torch.testing.assert_close(dx, weights[0].float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("inverse", DIRECTIONS)
def test_error_rule_in_half_types(name, dtype, inverse, memory):
    require("coupling_flow", name, dtype)
    specs = ("allinone", "rnvp, sigmoid clamp, conditional", "two hidden layers, gelu")
    for spec in specs if name == "cpp" else specs[:1]:  # the interpreter takes seconds
        bound = Bound(SPECS[spec], dtype, spread=0.1)
        check(name, bound, bound.inputs(17), inverse=inverse, memory=memory)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dim", [n for n in ODD_SIZES if n >= 2])
def test_error_rule_at_odd_dims(name, dim):
    require("coupling_flow", name)
    bound = Bound(allinone(dim, hidden=(31,)))
    check(name, bound, bound.inputs(5))


@pytest.mark.parametrize(
    ("name", "batch"),
    [("cpp", n) for n in (1, 2, 3, 4, 5, 17, 31, 32, 33, 95, 96, 97, 127, 130, 257)]
    + [("triton", n) for n in (1, 31, 33)],
)
def test_error_rule_at_odd_batches(name, batch):
    # 4, 96 and, with AMX, 16 a thread are where the CPU kernel changes how threads share the work; 256 rows fill its tile,
    # 32 that of Triton
    require("coupling_flow", name)
    bound = Bound(glow(6, hidden=(33,)), spread=0.02)
    check(name, bound, bound.inputs(batch), inverse=batch % 2 == 1, memory=MEMORY[batch // 2 % 2])


def test_error_rule_at_the_largest_dim():
    require("coupling_flow", "cpp")
    bound = Bound(allinone(1024, hidden=(48,), blocks=2), spread=0.01)
    check("cpp", bound, bound.inputs(6))


@pytest.mark.parametrize("inverse", DIRECTIONS)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("choice", ["reference", "cpp"])
def test_gradcheck_in_fp64(choice, inverse, memory):
    require("coupling_flow", choice, torch.float64)
    for spec in ("allinone, soft", "rnvp, sigmoid clamp, conditional", "two hidden layers, gelu", "glow"):
        bound = Bound(SPECS[spec], torch.float64)
        inputs = [t.requires_grad_() for t in bound.inputs(3)]
        run = on_backend(bound.op, choice)
        assert torch.autograd.gradcheck(
            lambda *a, run=run: run(*a, inverse=inverse, memory=memory),
            inputs,
            eps=1e-6,
            atol=1e-7,
            rtol=1e-5,
            fast_mode=True,
        )


@pytest.mark.parametrize("choice", ["reference", "cpp"])
@pytest.mark.parametrize("spec", SPECS)
def test_inverse_undoes_forward_and_logdet_is_the_jacobians(choice, spec):
    require("coupling_flow", choice, torch.float64)
    bound = Bound(SPECS[spec], torch.float64)
    x, theta, *cond = bound.inputs(4)
    with backend(choice):
        y, logdet = bound.op(x, theta, *cond)
        back, logdet_back = bound.op(y, theta, *cond, inverse=True)
        torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(logdet_back, -logdet, rtol=1e-10, atol=1e-10)
        for row in range(2):
            c = [t[row : row + 1] for t in cond]
            jacobian = torch.autograd.functional.jacobian(
                lambda v, c=c: bound.op(v[None], theta, *c)[0][0], x[row].clone()
            )
            torch.testing.assert_close(logdet[row], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)


def test_recompute_keeps_nothing_that_grows_with_depth():
    require("coupling_flow", "cpp")
    for blocks in (1, 10):
        bound = Bound(allinone(16, blocks=blocks))
        x, theta = bound.inputs(32)
        ints, floats = bound.spec.plan
        forward = torch.ops.lmvae_fast.coupling_flow_fwd
        args = (x, None, theta, bound.constants, bound.indices, ints, floats, False)
        assert forward(*args, 0)[2].numel() == 0
        assert forward(*args, 2)[2].numel() == 0
        assert forward(*args, 1)[2].numel() == 32 * saved_columns(ints) == 32 * blocks * (16 + 16 + 24)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("wanted", ["x", "theta", "y", "logdet"])
def test_gradients_that_nobody_asked_for(name, wanted):
    require("coupling_flow", name)
    bound = Bound(SPECS["glow"], spread=0.02)
    grads = []
    for run in (on_backend(bound.op, name), bound.plain):
        x, theta = (
            t.clone().requires_grad_(wanted != other) for t, other in zip(bound.inputs(5), ("theta", "x"), strict=True)
        )
        x.data.copy_(torch.linspace(-1, 1, x.numel()).view_as(x))
        y, logdet = run(x, theta)
        loss = {"y": y.square().sum(), "logdet": logdet.sum()}.get(wanted, y.sum() + logdet.square().sum())
        loss.backward()
        grads.append([t.grad for t in (x, theta) if t.grad is not None])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- layouts, memory, special values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(name, layout):
    require("coupling_flow", name)
    bound = Bound(SPECS["allinone, conditional"])
    check(name, bound, bound.inputs(6, layout))


def test_theta_inside_a_larger_storage():
    require("coupling_flow", "cpp")
    bound = Bound(SPECS["allinone"])
    x, theta = bound.inputs(7)
    check("cpp", bound, [x, torch.cat([theta.new_full((3,), float("nan")), theta])[3:]])


@pytest.mark.parametrize("name", FAST)
def test_empty_batch(name):
    require("coupling_flow", name)
    for memory in MEMORY:
        bound = Bound(SPECS["rnvp, sigmoid clamp, conditional"])
        outputs, grads, _ = run_with_grads(on_backend(bound.op, name), bound.inputs(0), memory=memory)
        assert [tuple(t.shape) for t in outputs] == [(0, 9), (0,)]
        assert (grads[1] == 0).all()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("spec", ["glow", "three hidden layers, silu, conditional"])
@pytest.mark.parametrize("batch", [3, 50, 300])
def test_nothing_is_written_outside_its_tensor(spec, memory, batch):
    require("coupling_flow", "cpp")
    bound = Bound(SPECS[spec])
    with backend("cpp"), GuardedAllocations() as guards:
        run_with_grads(bound.op, bound.inputs(batch), memory=memory)
    guards.check()


@pytest.mark.parametrize("name", FAST)
def test_large_magnitudes(name):
    require("coupling_flow", name)
    bound = Bound(SPECS["allinone"])
    x, theta = bound.inputs(8)
    check(name, bound, [x * 1e4, theta * 30])


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_inf_and_nan_stay_in_their_row(name, value):
    require("coupling_flow", name)
    bound = Bound(SPECS["allinone"])
    x, theta = bound.inputs(5)
    clean = on_backend(bound.op, name)(x, theta)
    x = x.clone()
    x[2, 3] = value
    (y, logdet), (y_plain, logdet_plain) = on_backend(bound.op, name)(x, theta), bound.plain(x, theta)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(y[others], clean[0][others], rtol=0, atol=0)
    torch.testing.assert_close(logdet[others], clean[1][others], rtol=0, atol=0)
    assert torch.equal(y[2].isfinite(), y_plain[2].isfinite())
    assert logdet[2].isfinite() == logdet_plain[2].isfinite()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("batch", [1, 20, 40, 300])
def test_same_bits_run_after_run_and_for_any_number_of_threads(memory, batch):
    require("coupling_flow", "cpp")
    bound = Bound(allinone(16, hidden=(200, 64), cond_dim=3, activation="silu"))
    assert_deterministic(on_backend(bound.op, "cpp"), bound.inputs(batch), memory=memory)
    assert_deterministic(on_backend(bound.op, "cpp"), bound.inputs(batch), inverse=True, memory=memory)


def test_a_row_does_not_depend_on_its_batch():
    require("coupling_flow", "cpp")
    bound = Bound(allinone(64, hidden=(256,), blocks=4))
    x, theta = bound.inputs(300)
    with backend("cpp"):
        whole = bound.op(x, theta)
        for rows in (1, 3, 64, 200):
            for ours, expected in zip(bound.op(x[:rows], theta), whole, strict=True):
                torch.testing.assert_close(ours, expected[:rows], rtol=0, atol=0)


def test_triton_addresses_are_64_bit():
    triton_module = pytest.importorskip("lmvae_fast.kernels.coupling_flow.triton_kernels")
    assert_int64_addresses(triton_module)
