"""sample_token's Triton kernel on a CUDA device: the ids of the CPU's reference, no waiting, graphs, large addresses."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.backend import choose
from lmvae_fast.kernels.sample_token import sample_token
from tests.kernels.common import LAYOUTS, ODD_SIZES, GuardedAllocations, lay_out, on_backend
from tests.kernels.test_sample_token import FILTERS

from .common import DTYPES, SEED, capture, far_apart, no_host_sync, triton

pytestmark = pytest.mark.gpu
op, reference = triton(sample_token), on_backend(sample_token, "reference")


def same(logits, **options):
    """Ids on the device are those of the reference on the CPU, log-probabilities fp64's to fp32 rounding."""
    ids, logprob = op(logits.cuda(), seed=SEED, logprob=True, **options)
    assert torch.equal(ids.cpu(), reference(logits, seed=SEED, **options))
    expected = logits.double().log_softmax(-1).gather(-1, ids.cpu()[:, None])[:, 0]
    torch.testing.assert_close(logprob.cpu().double(), expected, rtol=1e-6, atol=1e-6)


def test_triton_is_what_a_cuda_tensor_gets():
    for dtype in DTYPES:
        assert choose("sample_token", torch.zeros(1, 1, device="cuda", dtype=dtype)) == "triton"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*ODD_SIZES, 50_257])
def test_ids_are_the_cpus(dtype, size):
    logits = (3 * torch.randn(16, size)).to(dtype)
    for options in FILTERS:
        same(logits, **options)


@pytest.mark.parametrize("scale", [0.01, 6.0, 40.0])
def test_from_nearly_uniform_to_one_token(scale):
    for options in FILTERS:
        same(scale * torch.randn(16, 50_257), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    logits, seen = (lay_out(x.cuda(), layout) for x in (3 * torch.randn(5, 131), torch.rand(5, 131) < 0.3))
    rows, steps = torch.arange(20, device="cuda")[::4], torch.arange(10, 0, -2, device="cuda")
    options = {"top_p": 0.8, "repetition_penalty": 1.5, "seed": SEED}
    ids = op(logits, seen=seen, rows=rows, steps=steps, **options)
    expected = reference(logits.cpu(), seen=seen.cpu(), rows=rows.cpu(), steps=steps.cpu(), **options)
    assert torch.equal(ids.cpu(), expected)


@pytest.mark.parametrize("options", FILTERS)
def test_rows_that_are_not_finite(options):
    logits = torch.randn(4, 40)
    logits[0, 7], logits[0, 11] = float("nan"), float("inf")
    logits[1, 9] = logits[1, 30] = float("inf")
    logits[2] = -float("inf")
    logits[3, :39] = -float("inf")
    ids = op(logits.cuda(), seed=SEED, **options)
    assert ids.tolist() == [7, 9, 0, 39]


def test_empty_batch():
    ids, logprob = op(torch.zeros(0, 5, device="cuda"), logprob=True)
    assert (ids.shape, ids.dtype, logprob.shape) == ((0,), torch.int64, (0,))


def test_small_writes_stay_inside_their_buffers():
    for size in (1, 17, 2049):
        logits = torch.randn(7, size, device="cuda")
        seen = torch.ones(7, size, dtype=torch.uint8, device="cuda")
        for options in FILTERS:
            with GuardedAllocations() as guards:
                op(logits, seed=1, logprob=True, seen=seen, repetition_penalty=1.2, **options)
            guards.check()


@pytest.mark.parametrize("seed", [None, SEED])
def test_no_host_synchronisation(seed):
    logits = torch.randn(64, 3000, device="cuda")
    seen = torch.zeros(64, 3000, dtype=torch.uint8, device="cuda")
    options = {"top_k": 40, "top_p": 0.9, "seen": seen, "repetition_penalty": 1.1, "logprob": True, "seed": seed}
    op(logits, **options)  # compiles
    with no_host_sync():
        op(logits, **options)


def test_a_graph_draws_by_the_steps_and_logits_of_its_replay():
    logits, rows = torch.randn(64, 3000, device="cuda"), torch.arange(64, device="cuda")
    steps, seed = torch.zeros_like(rows), torch.tensor([5, 0], device="cuda")
    graph, ids = capture(lambda: op(logits, top_p=0.9, seed=seed, rows=rows, steps=steps))
    draws = []
    for step in range(3):
        steps.fill_(step)
        graph.replay()
        draws.append(ids.clone())
        assert torch.equal(ids, op(logits, top_p=0.9, seed=seed, rows=rows, steps=steps))
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])
    logits.neg_()
    graph.replay()
    assert torch.equal(ids, op(logits, top_p=0.9, seed=seed, rows=rows, steps=steps))


def test_fullgraph_compile_gives_the_same():
    logits, seed = torch.randn(5, 44, device="cuda"), torch.tensor([3, 4], device="cuda")

    def run(logits):
        return sample_token(logits, seed=seed, top_k=9, top_p=0.9, logprob=True)

    torch._dynamo.reset()
    expected, got = run(logits), torch.compile(run, fullgraph=True)(logits)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_large_logits_far_apart(card):
    logits = torch.randn(3, 130, dtype=torch.bfloat16, device="cuda")
    for options in FILTERS:
        assert torch.equal(op(far_apart(logits, card), seed=SEED, **options), op(logits, seed=SEED, **options))
