"""sample_token against its reference and against definitions: filters, draws, ties, layouts, bad input, every backend."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.backend import BackendError, backend
from lmvae_fast.kernels.sample_token import reference, sample_token

from .common import (
    LAYOUTS,
    ODD_SIZES,
    GuardedAllocations,
    assert_int64_addresses,
    lay_out,
    on_backend,
    opcheck,
    raises_naming,
    require,
)

FAST = ("cpp", "triton")
ALL = ("reference", *FAST)
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
SEED = 0x1234_5678_9ABC_DEF0
FILTERS = (
    {"greedy": True},
    {},
    {"temperature": 0.3},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
)


def some(name, count):
    """That many rows; a fifteenth of them in Triton's interpreter, which takes its time for each."""
    return count if name != "triton" else max(2, count // 15)


def same(name, logits, **options):
    """Ids of a backend and of the reference are equal, log-probabilities those of fp64 to fp32 rounding: torch's own fp32
    sum over a vocabulary is off by more on CPUs where it does not vectorise."""
    arguments = {"seed": SEED, "logprob": True, **options}
    ids, logprob = on_backend(sample_token, name)(logits, **arguments)
    expected, _ = on_backend(sample_token, "reference")(logits, **arguments)
    expected_logprob = logits.double().log_softmax(-1).gather(-1, expected.unsqueeze(-1)).squeeze(-1).float()
    assert torch.equal(ids, expected)
    torch.testing.assert_close(logprob, expected_logprob, rtol=2e-6, atol=2e-6, equal_nan=True)
    return ids


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("size", ODD_SIZES)
def test_odd_sizes(name, dtype, size):
    require("sample_token", name, dtype)
    logits = (3 * torch.randn(some(name, 6), size)).to(dtype)
    for options in FILTERS:
        same(name, logits, **options)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0, 40.0])
def test_a_real_vocabulary(name, options, scale):
    """From nearly uniform to one token that holds everything; several blocks and chunks, and a tail."""
    require("sample_token", name)
    same(name, scale * torch.randn(some(name, 16), 50_257 if name == "cpp" else 5000), **options)


@pytest.mark.parametrize("options", FILTERS)
def test_double_precision(options):
    require("sample_token", "cpp", torch.float64)
    same("cpp", 3 * torch.randn(9, 777, dtype=torch.float64), **options)


@pytest.mark.parametrize(
    ("scale", "options", "searched"),
    [
        (6.0, {"top_k": 40, "top_p": 0.9}, False),
        (6.0, {"top_p": 0.95, "min_p": 0.01}, False),
        (40.0, {"top_k": 50}, False),  # fewer than 50 weigh anything
        (0.01, {"top_k": 2500}, True),
        (0.01, {"top_p": 0.9}, True),
        (0.01, {"top_k": 3}, True),  # nearly uniform: one bin of the histogram holds them all
    ],
)
def test_where_a_filter_cuts_is_found_in_registers_or_by_search(scale, options, searched, monkeypatch):
    require("sample_token", "triton")
    from lmvae_fast.kernels.sample_token import triton_kernels as kernels

    search, searches = kernels._draw_by_search, []
    monkeypatch.setattr(kernels, "_draw_by_search", lambda *args: (searches.append(1), search(*args))[1])
    logits = scale * torch.randn(2, 3000)
    same("triton", logits, **options)
    assert len(searches) == (2 if searched else 0)
    if not searched and "top_k" not in options:  # a bin that does not hold the cut is noticed, and the row is searched
        last_bin = kernels._last_bin
        monkeypatch.setattr(kernels, "_last_bin", lambda *args: (last_bin(*args)[0] * 0, 1))
        same("triton", logits, **options)
        assert len(searches) == 2


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(name, layout):
    require("sample_token", name)
    logits, seen = lay_out(3 * torch.randn(5, 131), layout), lay_out(torch.rand(5, 131) < 0.3, layout)
    rows, steps = torch.arange(20)[::4], torch.arange(10, 0, -2)
    same(name, logits, top_p=0.8, seen=seen, repetition_penalty=1.5, rows=rows, steps=steps)
    same(name, logits, greedy=True, seen=seen, repetition_penalty=1.5)


@pytest.mark.parametrize("name", ALL)
def test_filters_keep_what_their_definitions_keep(name):
    """Drawn many times: what comes out is the kept set, with the kept probabilities."""
    require("sample_token", name)
    draws = 900 if name != "triton" else 24
    logits = 2 * torch.randn(1, 23)
    p = torch.softmax(logits[0].double() / 0.8, -1)
    order = p.argsort(descending=True)
    nucleus = order[: int((p[order].cumsum(0) < 0.75).sum()) + 1]
    cases = (
        ({"top_k": 4}, order[:4]),
        ({"top_p": 0.75}, nucleus),
        ({"min_p": 0.15}, order[p[order] >= 0.15 * p.max()]),
        ({"top_k": 1}, order[:1]),
        ({"top_p": 1e-9}, order[:1]),
        ({"min_p": 1.0}, order[:1]),
    )
    for options, kept in cases:
        with backend(name):
            ids = sample_token(logits.expand(draws, -1), temperature=0.8, seed=3, **options)
        counts = torch.bincount(ids, minlength=23).double() / draws
        expected = torch.zeros(23).double().index_copy_(0, kept, p[kept] / p[kept].sum())
        assert ((counts > 0) <= (expected > 0)).all(), options
        # five standard deviations of a binomial frequency
        assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-4).all(), options


@pytest.mark.parametrize("name", ALL)
def test_equal_scores_stay_or_go_together(name):
    require("sample_token", name)
    logits = torch.tensor([[1.0, 0.0, 1.0, -1.0, 1.0, 0.0, -2.0]]).repeat(some(name, 750), 1)  # an id one draw in ten
    with backend(name):
        assert sample_token(logits, greedy=True)[0] == 0
        assert set(sample_token(logits, seed=1, top_k=2).tolist()) == {0, 2, 4}
        assert set(sample_token(logits, seed=1, top_p=0.3).tolist()) == {0, 2, 4}
        assert set(sample_token(logits, seed=1, top_k=4).tolist()) == {0, 1, 2, 4, 5}
        constant = torch.zeros(some(name, 450), 40)
        assert len(set(sample_token(constant, seed=1, top_k=1).tolist())) > 15


@pytest.mark.parametrize("name", ALL)
def test_a_draw_depends_on_its_row_and_step_only(name):
    require("sample_token", name)
    logits = torch.randn(7, 60)
    rows, steps = torch.tensor([5, 0, 2**40, 7, 1, 3, 9]), torch.tensor([0, 1, 2, 2**33, 5, 5, 6])
    with backend(name):
        whole = sample_token(logits, seed=9, rows=rows, steps=steps)
        for b in range(7):
            alone = sample_token(logits[b : b + 1], seed=9, rows=rows[b : b + 1], steps=steps[b : b + 1])
            assert alone == whole[b]
        # a step is an offset of the stream
        pair = torch.tensor([9, 4])
        moved = sample_token(logits, seed=pair, rows=rows, steps=steps - 4)
        assert torch.equal(moved, whole)
        many = logits[:1].expand(24, -1)
        assert len(set(sample_token(many, seed=9).tolist())) > 10
        assert not torch.equal(sample_token(many, seed=9, steps=torch.ones(24).long()), sample_token(many, seed=9))


@pytest.mark.parametrize("name", ALL)
def test_repetition_penalty(name):
    require("sample_token", name)
    logits = torch.tensor([[2.0, 1.5, -1.0], [-1.0, -1.5, -3.0]])
    seen = torch.tensor([[1, 0, 0], [1, 0, 0]], dtype=torch.uint8)
    with backend(name):
        assert sample_token(logits, greedy=True, seen=seen, repetition_penalty=2.0).tolist() == [1, 1]
        assert sample_token(logits, greedy=True, seen=seen.bool(), repetition_penalty=1.2).tolist() == [0, 0]
        assert sample_token(logits, greedy=True, seen=seen, repetition_penalty=1.0).tolist() == [0, 0]
        ids, logprob = sample_token(logits, greedy=True, seen=seen, repetition_penalty=2.0, logprob=True)
    expected = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]  # of the model's distribution, not the penalised
    torch.testing.assert_close(logprob, expected)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("options", FILTERS)
def test_rows_that_are_not_finite(name, options):
    require("sample_token", name)
    inf, nan = float("inf"), float("nan")
    logits = torch.randn(5, 40)
    logits[0, 7] = nan
    logits[0, 11] = inf
    logits[0, 20] = nan
    logits[1, 9] = logits[1, 30] = inf
    logits[2] = -inf
    logits[3, :39] = -inf
    with backend(name):
        ids, logprob = sample_token(logits, seed=SEED, logprob=True, **options)
    assert ids[:4].tolist() == [7, 9, 0, 39]
    torch.testing.assert_close(logprob[:4], torch.tensor([nan, nan, nan, 0.0]), equal_nan=True)


@pytest.mark.parametrize("name", ALL)
def test_forbidden_tokens_never_come_out(name):
    require("sample_token", name)
    logits = torch.randn(some(name, 45), 37)
    logits[:, ::2] = -float("inf")
    with backend(name):
        for options in FILTERS:
            assert (sample_token(logits, seed=2, **options) % 2 == 1).all()
            assert (sample_token(logits, seed=2, **{**options, "temperature": 1e300}) % 2 == 1).all()


@pytest.mark.parametrize("name", ALL)
def test_extreme_temperatures(name):
    require("sample_token", name)
    logits = torch.randn(some(name, 50), 33)
    with backend(name):
        assert torch.equal(sample_token(logits, seed=1, temperature=1e-45), logits.argmax(-1))
        hot = sample_token(logits[:1].expand(some(name, 900), -1), seed=1, temperature=1e300)
    assert len(set(hot.tolist())) > 20


def test_scores_that_the_bisection_halves_badly():
    """Values spaced by powers of two: the middle of the range drops few at a time, and the cut is still exact."""
    require("sample_token", "cpp")
    x = -(2.0 ** torch.linspace(-100, 4, 3000))
    for options in ({"top_k": 1500}, {"top_p": 0.5}, {"top_k": 2500, "top_p": 0.9}):
        same("cpp", x.expand(20, -1), **options)


@pytest.mark.parametrize("name", ALL)
def test_empty_batch(name):
    require("sample_token", name)
    with backend(name):
        ids, logprob = sample_token(torch.zeros(0, 5), logprob=True)
    assert (ids.shape, ids.dtype, logprob.shape) == ((0,), torch.int64, (0,))


def test_weights_are_exact_in_any_order():
    for size in (1, 2, 1000, 2**17):
        weights = reference.token_weights(-20 * torch.rand(1, size))
        shuffled = weights[:, torch.randperm(size)]
        assert torch.equal(weights.cumsum(-1)[:, -1], shuffled.cumsum(-1)[:, -1])
        assert torch.equal(weights.sum(-1), weights.cumsum(-1)[:, -1])


def test_manual_seed_governs():
    logits = torch.randn(50, 90)
    torch.manual_seed(5)
    first, second = sample_token(logits), sample_token(logits)
    torch.manual_seed(5)
    assert torch.equal(first, sample_token(logits))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", FAST)
def test_nothing_is_written_outside_the_outputs(name):
    require("sample_token", name)
    for size in (1, 17, 130, 2049):
        logits = torch.randn(some(name, 7), size)
        for options in FILTERS:
            with GuardedAllocations() as guards, backend(name):
                sample_token(logits, seed=1, logprob=True, **options)
            guards.check()


def test_same_ids_for_any_number_of_threads():
    require("sample_token", "cpp")
    logits = torch.randn(33, 5000)
    threads = torch.get_num_threads()
    try:
        got = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got.append(on_backend(sample_token, "cpp")(logits, seed=4, top_p=0.9, logprob=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in got[1:] for a, b in zip(other, got[0], strict=True))


@pytest.mark.parametrize("choice", FAST)
def test_opcheck(choice):
    require("sample_token", choice)
    logits, seed, rows, steps = torch.randn(3, 6), torch.tensor([1, 2]), torch.arange(3), torch.zeros(3).long()
    seen = torch.ones(3, 6, dtype=torch.uint8)
    opcheck("sample_token", (logits, seed, rows, steps, None, False, 1.0, 0, 0.9, 0.0, 1.0, True), choice)
    opcheck("sample_token", (logits, seed, rows, steps, seen, True, 1.0, 0, 1.0, 0.0, 1.5, False), choice)


@pytest.mark.parametrize("name", ["cpp", "triton", "reference"])
def test_fullgraph_compile_gives_the_same(name):
    require("sample_token", name)
    logits, seed = torch.randn(5, 44), torch.tensor([3, 4])

    def run(logits):
        return sample_token(logits, seed=seed, top_k=9, top_p=0.9, logprob=True)

    with backend(name):
        torch._dynamo.reset()
        expected = run(logits)
        got = torch.compile(run, fullgraph=True, backend="aot_eager")(logits)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_logits_that_want_a_gradient_are_refused():
    logits = torch.randn(3, 8, requires_grad=True)
    with raises_naming(ValueError, "sample_token", "logits", "detach"):
        sample_token(logits, seed=1, logprob=True)
    with torch.no_grad():
        assert not sample_token(logits, seed=1, logprob=True)[1].requires_grad


def test_vmap_is_refused():
    with raises_naming(TypeError, "sample_token", "vmap"):
        torch.func.vmap(lambda row: sample_token(row, greedy=True))(torch.randn(3, 2, 8))


def test_addresses_are_64_bit():
    pytest.importorskip("triton", reason="triton is not installed")
    from lmvae_fast.kernels.sample_token import triton_kernels

    assert_int64_addresses(triton_kernels)


def test_bad_input_is_named():
    logits = torch.randn(3, 8)
    with raises_naming(ValueError, "logits", "[8]"):
        sample_token(logits[0])
    with raises_naming(ValueError, "logits", "[3, 0]"):
        sample_token(logits[:, :0])
    with raises_naming(TypeError, "logits", "int64"):
        sample_token(logits.long())
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with raises_naming(ValueError, "temperature"):
            sample_token(logits, temperature=bad)
        with raises_naming(ValueError, "repetition_penalty"):
            sample_token(logits, repetition_penalty=bad, seen=torch.zeros(3, 8).bool())
    for bad in (0.0, 1.01, float("nan")):
        with raises_naming(ValueError, "top_p"):
            sample_token(logits, top_p=bad)
    for bad in (-0.1, 1.01, float("nan")):
        with raises_naming(ValueError, "min_p"):
            sample_token(logits, min_p=bad)
    for bad in (-1, 2.0, True):
        with raises_naming(ValueError, "top_k"):
            sample_token(logits, top_k=bad)
    with raises_naming(ValueError, "repetition_penalty=1.3", "seen"):
        sample_token(logits, repetition_penalty=1.3)
    with raises_naming(ValueError, "seen", "[3, 7]", "[3, 8]"):
        sample_token(logits, seen=torch.zeros(3, 7).bool())
    with raises_naming(TypeError, "seen", "float32"):
        sample_token(logits, seen=torch.zeros(3, 8))
    for name in ("rows", "steps"):
        with raises_naming(ValueError, name, "[3]", "[4]"):
            sample_token(logits, **{name: torch.zeros(4).long()})
        with raises_naming(TypeError, name, "int32"):
            sample_token(logits, **{name: torch.zeros(3).int()})
        with raises_naming(ValueError, name, "meta"):
            sample_token(logits, **{name: torch.zeros(3, dtype=torch.int64, device="meta")})
    with raises_naming(TypeError, "seed"):
        sample_token(logits, seed=1.5)


def test_a_forced_backend_that_cannot_run_is_an_error():
    with backend("triton"), raises_naming(BackendError, "sample_token", "float64"):
        sample_token(torch.zeros(2, 4).double())
