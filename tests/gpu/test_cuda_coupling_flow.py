"""coupling_flow's Triton kernels on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.coupling_flow.op import MEMORY
from lmvae_fast.models.flow import CouplingFlow
from tests.kernels.common import (
    LAYOUTS,
    ODD_SIZES,
    GuardedAllocations,
    assert_deterministic,
    assert_fullgraph_equal,
    assert_op_within_error_rule,
    require,
    run_with_grads,
)
from tests.kernels.test_coupling_flow import SPECS, SPREAD, Bound, allinone, glow

from .common import DTYPES, assert_no_host_sync, assert_replays, assert_same_far_apart, cuda, triton

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _has_a_triton_form(_needs_cuda):
    require("coupling_flow", "triton", device="cuda")


def make(spec, dtype=torch.float32, spread=0.1):
    bound = Bound(spec, dtype, spread=spread)
    bound.theta, bound.constants, bound.indices = (x.cuda() for x in (bound.theta, bound.constants, bound.indices))
    return bound


def make_inputs(bound, batch, layout="dense"):
    x, theta, *cond = bound.inputs(batch)
    (x, *cond) = cuda([x, *cond], layout)
    return [x, theta.cuda(), *cond]


def check(bound, arguments, **kwargs):
    assert_op_within_error_rule(triton(bound.op), bound.plain, arguments, ("y", "logdet"), bound.grad_names, **kwargs)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("spec", SPECS)
def test_error_rule_for_every_kind_of_stage(spec, inverse, memory):
    bound = make(SPECS[spec], spread=SPREAD[memory])
    check(bound, make_inputs(bound, 19), inverse=inverse, memory=memory)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_error_rule_in_half_precision(dtype):
    for spec in ("allinone", "rnvp, sigmoid clamp, conditional"):
        bound = make(SPECS[spec], dtype)
        check(bound, make_inputs(bound, 17))


@pytest.mark.parametrize("dim", [n for n in ODD_SIZES if n >= 2])
def test_error_rule_at_odd_dims(dim):
    bound = make(allinone(dim, hidden=(31,)))
    check(bound, make_inputs(bound, 5))


@pytest.mark.parametrize("batch", [1, 31, 33, 130, 257])
def test_error_rule_at_odd_batches(batch):
    bound = make(glow(6, hidden=(33,)), spread=0.02)
    check(bound, make_inputs(bound, batch), inverse=batch % 2 == 1)


def test_error_rule_at_the_size_of_a_real_flow():
    bound = make(allinone(128, hidden=(512,), blocks=10), spread=0.01)
    check(bound, make_inputs(bound, 512))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    bound = make(SPECS["allinone, conditional"])
    check(bound, make_inputs(bound, 6, layout))


def test_empty_batch():
    for memory in MEMORY:
        bound = make(SPECS["rnvp, sigmoid clamp, conditional"])
        outputs, grads, _ = run_with_grads(triton(bound.op), make_inputs(bound, 0), memory=memory)
        assert [tuple(t.shape) for t in outputs] == [(0, 9), (0,)]
        assert (grads[1] == 0).all()


def test_inverse_undoes_forward():
    bound = make(allinone(64, hidden=(128,), blocks=4), spread=0.02)
    x, theta = make_inputs(bound, 100)
    y, logdet = triton(bound.op)(x, theta)
    back, logdet_back = triton(bound.op)(y, theta, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logdet_back, -logdet, rtol=1e-4, atol=1e-4)


def test_small_writes_stay_inside_their_buffers():
    for memory in MEMORY:
        bound = make(SPECS["three hidden layers, silu, conditional"])
        arguments = make_inputs(bound, 50)
        with GuardedAllocations() as guards:
            outputs, grads, _ = run_with_grads(triton(bound.op), arguments, memory=memory)
        guards.check()
        assert all(x.isfinite().all() for x in (*outputs, *grads))


@pytest.mark.parametrize("memory", MEMORY)
def test_same_bits_run_to_run(memory):
    bound = make(allinone(16, hidden=(200, 64), cond_dim=3, activation="silu"))
    assert_deterministic(triton(bound.op), make_inputs(bound, 300), memory=memory)


@pytest.mark.parametrize("memory", MEMORY)
def test_no_host_synchronisation(memory):
    bound = make(SPECS["allinone, conditional"])
    assert_no_host_sync(triton(bound.op), make_inputs(bound, 20), memory=memory)


def test_fullgraph_compile_gives_the_same():
    bound = make(SPECS["allinone, conditional"])
    assert_fullgraph_equal(bound.op, make_inputs(bound, 6), compiler="inductor")


def test_graph_replays_on_new_values():
    bound = make(SPECS["allinone, conditional"])
    assert_replays(triton(bound.op), make_inputs(bound, 20))


def test_module_on_the_device_equals_the_cpus():
    flow = CouplingFlow(16, blocks=3, hidden=32)
    x = torch.randn(40, 16)
    z, logdet = flow(x)
    device_z, device_logdet = flow.cuda()(x.cuda())
    torch.testing.assert_close(device_z.cpu(), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(device_logdet.cpu(), logdet, rtol=1e-4, atol=1e-4)


def test_large_inputs_far_apart(card):
    bound = make(SPECS["allinone"], torch.bfloat16)
    assert_same_far_apart(triton(bound.op), make_inputs(bound, 3), (0,), card)


def test_large_activations(card):
    """Kept activations of more than 2^31 elements: the last rows have the gradients that they have alone."""
    bound = make(allinone(32, hidden=(256,), blocks=4), spread=0.02)
    batch = 2**21
    if card < 60 * 2**30:
        pytest.skip(f"needs 60 GiB of device memory, {card / 2**30:.0f} are free")
    x, theta = make_inputs(bound, batch)
    (y, logdet), (dx, _), weights = run_with_grads(triton(bound.op), [x, theta])
    tail = slice(batch - 7, batch)
    (tail_y, tail_logdet), (tail_dx, _), _ = run_with_grads(
        triton(bound.op), [x[tail], theta], [w[tail] for w in weights]
    )
    for ours, alone in ((y, tail_y), (logdet, tail_logdet), (dx, tail_dx)):
        torch.testing.assert_close(ours[tail], alone, rtol=1e-4, atol=1e-4)
