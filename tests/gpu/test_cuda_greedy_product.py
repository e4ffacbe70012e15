"""greedy_product's Triton kernels on a CUDA device: the greatest of a product in fp64, no waiting, graphs."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.backend import choose
from lmvae_fast.kernels.greedy_head import MOST_ROWS, greedy_product
from tests.kernels.common import LAYOUTS, ODD_SIZES, GuardedAllocations, lay_out
from tests.kernels.test_greedy_product import assert_greatest

from .common import DTYPES, capture, no_host_sync, triton

pytestmark = pytest.mark.gpu
op = triton(greedy_product)


def _given(rows, vocabulary, inputs, dtype):
    shapes = (rows, inputs), (vocabulary, inputs)
    return tuple(torch.randn(shape, device="cuda").to(dtype) for shape in shapes)


def test_triton_is_what_a_cuda_tensor_gets():
    for dtype in DTYPES:
        assert choose("greedy_product", torch.zeros(1, 1, device="cuda", dtype=dtype)) == "triton"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ODD_SIZES)
def test_odd_sizes(dtype, size):
    for shape in ((size, 300, 64), (3, size, 64), (3, 300, size)):
        hidden, weight = _given(*shape, dtype)
        assert_greatest(op(hidden, weight), hidden, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_real_head_for_all_rows_that_it_serves(dtype):
    for rows in (1, 16, 17, MOST_ROWS[dtype]):
        hidden, weight = _given(rows, 50_257, 768, dtype)
        assert_greatest(op(hidden, weight), hidden, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    hidden, weight = (lay_out(x, layout) for x in _given(9, 130, 70, torch.bfloat16))
    assert_greatest(op(hidden, weight), hidden, weight)


def test_ties_and_nan():
    hidden, weight = torch.ones(2, 64, device="cuda"), torch.zeros(500, 64, device="cuda")
    weight[[90, 91, 499]] = 1.0
    ids, logits = op(hidden, weight)
    assert ids.tolist() == [90, 90]
    assert logits.tolist() == [64.0, 64.0]
    weight[400, 3] = float("nan")
    ids, logits = op(hidden, weight)
    assert ids.tolist() == [400, 400]
    assert logits.isnan().all()


def test_the_host_does_not_wait_and_a_graph_computes_on_new_values():
    hidden, weight = _given(5, 3000, 96, torch.bfloat16)
    op(hidden, weight)
    with no_host_sync():
        op(hidden, weight)
    graph, (ids, logits) = capture(lambda: op(hidden, weight))
    hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    torch.cuda.synchronize()
    assert_greatest((ids, logits), hidden, weight)


def test_nothing_is_written_or_read_outside():
    hidden, weight = _given(19, 1333, 129, torch.bfloat16)
    with GuardedAllocations() as guarded:
        found = op(hidden, weight)
    guarded.check()
    assert_greatest(found, hidden, weight)
