"""Random flows: any sequence of stages, widths, layouts and batch sizes, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmvae_fast.kernels.backend import backend, why_not
from lmvae_fast.kernels.coupling_flow import Coupling, FlowParams, FlowSpec, Stage, Subnet, coupling_flow, reference
from lmvae_fast.models.flow import CouplingFlow
from tests.kernels.common import LAYOUTS, lay_out, run_with_grads

subnets = st.builds(
    Subnet,
    hidden=st.lists(st.integers(1, 70), max_size=3).map(tuple),
    activation=st.sampled_from(["relu", "gelu", "silu"]),
)


@st.composite
def specs(draw) -> FlowSpec:
    dim, cond_dim = draw(st.integers(2, 70)), draw(st.sampled_from([0, 0, 1, 9]))
    stages = []
    for _ in range(draw(st.integers(1, 4))):
        coupling = None
        if draw(st.integers(0, 4)):
            coupling = Coupling(
                split=draw(st.integers(1, dim - 1)),
                active=draw(st.integers(0, 1)),
                subnets=tuple(draw(st.lists(subnets, min_size=1, max_size=2))),
                clamp=draw(st.floats(0.1, 3.0)),
                squash=draw(st.sampled_from(["tanh", "atan", "sigmoid", "none"])),
                gain=draw(st.sampled_from([0.1, 1.0])),
                conditional=cond_dim > 0 and draw(st.booleans()),
            )
        affine = draw(st.sampled_from([None, "softplus", "exp", "sigmoid"]))
        stages.append(Stage(coupling, affine, draw(st.sampled_from([None, "hard", "soft"]))))
    return FlowSpec(dim, cond_dim, tuple(stages))


@pytest.mark.fuzz
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    spec=specs(),
    batch=st.one_of(st.integers(0, 12), st.sampled_from([95, 96, 97, 255, 256, 257, 513])),
    inverse=st.booleans(),
    memory=st.sampled_from(["save", "recompute"]),
    layout=st.sampled_from([name for name in LAYOUTS if name != "expanded"]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_cpp_equals_the_reference_on_random_flows(spec, batch, inverse, memory, layout, threads, seed):
    if why_not("coupling_flow", "cpp", "cpu", torch.float64, {}) is not None:
        pytest.skip("no C++ extension")
    torch.manual_seed(seed)
    flow = CouplingFlow.from_spec(spec).double()
    flow._reset(None)
    inputs = [
        lay_out(torch.randn(batch, spec.dim, dtype=torch.float64), layout if batch else "dense"),
        flow.theta.detach(),
    ]
    if spec.cond_dim:
        inputs.append(torch.randn(batch, spec.cond_dim, dtype=torch.float64))

    def op(x, theta, cond=None):
        params = FlowParams(spec, theta, flow.constants, flow.indices)
        return coupling_flow(x, params, cond=cond, inverse=inverse, memory=memory)

    def plain(x, theta, cond=None):
        # 0 * theta: a flow of permutations alone does not use theta, and its gradient is zero
        params = FlowParams(spec, theta, flow.constants, flow.indices)
        y, logdet = reference.coupling_flow(x, params, cond=cond, inverse=inverse)
        unused = 0 * (theta.sum() + (cond.sum() if cond is not None else 0))
        return y + unused, logdet + unused

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with backend("cpp"):
            outputs, grads, weights = run_with_grads(op, inputs)
    finally:
        torch.set_num_threads(before)
    expected, expected_grads, _ = run_with_grads(plain, inputs, weights)
    for ours, truth in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
        scale = max(1.0, truth.abs().max().item() if truth.numel() else 1.0)
        torch.testing.assert_close(ours, truth, rtol=1e-7, atol=1e-8 * scale)
