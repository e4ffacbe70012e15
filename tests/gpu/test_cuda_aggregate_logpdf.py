"""aggregate_logpdf's Triton kernels on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.aggregate_logpdf import aggregate_logpdf
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
from tests.kernels.test_aggregate_logpdf import FORMS, PUBLIC_CODE, inputs, offsets, plain

from .common import DTYPES, assert_no_host_sync, assert_replays, assert_same_far_apart, cuda, triton

pytestmark = pytest.mark.gpu
op = triton(aggregate_logpdf)


@pytest.fixture(autouse=True)
def _has_a_triton_form(_needs_cuda):
    require("aggregate_logpdf", "triton", device="cuda")


def check(arguments, **kwargs):
    assert_op_within_error_rule(op, plain, arguments, ("logq",), ("z", "mu", "logvar"), **kwargs)


def groups(posteriors, rows):
    return {"cu_posteriors": offsets(posteriors).cuda(), "cu_z": offsets(rows).cuda()}


@pytest.mark.parametrize("per_dim", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", ODD_SIZES)
def test_error_rule_at_odd_sizes(dim, dtype, per_dim):
    check(cuda(inputs((80, dim), 40, dtype)), per_dim=per_dim, min_var=PUBLIC_CODE)


@pytest.mark.parametrize("per_dim", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, per_dim):
    check(cuda(inputs((3, 6, 37), 6), layout), per_dim=per_dim)


@pytest.mark.parametrize("per_dim", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_unequal_sizes(dtype, per_dim):
    posteriors, rows = [1, 3, 2, 17, 5], [2, 0, 1, 9, 151]
    check(cuda(inputs((3, sum(rows), 19), sum(posteriors), dtype)), per_dim=per_dim, **groups(posteriors, rows))


@pytest.mark.parametrize("per_dim", FORMS)
def test_long_sums(per_dim):
    check(cuda(inputs((700, 33), 300)), per_dim=per_dim)
    check(cuda(inputs((40, 769), 35, spread=0.1)), per_dim=per_dim)
    check(cuda(inputs((5, 3), 5000)), per_dim=per_dim)


@pytest.mark.parametrize("per_dim", FORMS)
def test_empty_batch(per_dim):
    (found,), grads, _ = run_with_grads(op, cuda(inputs((0, 8), 4)), per_dim=per_dim)
    assert found.shape == ((0, 8) if per_dim else (0,))
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("per_dim", FORMS)
def test_small_writes_stay_inside_their_buffers(per_dim):
    arguments = cuda(inputs((2, 7, 130), 7))
    with GuardedAllocations() as guards:
        run_with_grads(op, arguments, per_dim=per_dim, **groups([3, 4], [3, 4]))
    guards.check()


@pytest.mark.parametrize("per_dim", FORMS)
def test_same_bits_run_to_run(per_dim):
    options = groups([20, 1, 9], [301, 4, 95])
    assert_deterministic(op, cuda(inputs((3, 400, 65), 30)), per_dim=per_dim, **options)


@pytest.mark.parametrize("per_dim", FORMS)
def test_no_host_synchronisation(per_dim):
    assert_no_host_sync(op, cuda(inputs((20, 16), 20)), per_dim=per_dim)
    assert_no_host_sync(op, cuda(inputs((20, 16), 20)), per_dim=per_dim, **groups([5, 15], [5, 15]))


@pytest.mark.parametrize("per_dim", FORMS)
def test_fullgraph_compile_gives_the_same(per_dim):
    assert_fullgraph_equal(aggregate_logpdf, cuda(inputs((6, 9), 5)), per_dim=per_dim, compiler="inductor")


@pytest.mark.parametrize("per_dim", FORMS)
def test_graph_replays_on_new_values(per_dim):
    assert_replays(op, cuda(inputs((20, 16), 20)), per_dim=per_dim)


@pytest.mark.parametrize("per_dim", FORMS)
def test_large_inputs_far_apart(per_dim, card):
    assert_same_far_apart(op, cuda(inputs((3, 40), 4, torch.bfloat16)), (0,), card, per_dim=per_dim)
