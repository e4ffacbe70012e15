"""greedy_head: the argmax of an fp32 product, also where bf16 could not tell."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lmvae_fast.kernels.greedy_head import greedy_head, pack_head

from .common import LAYOUTS, ODD_SIZES, GuardedAllocations, lay_out, on_backend, opcheck, raises_naming, require

BACKENDS = ("reference", "cpp")


def assert_argmax(ids: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """The logit of every id is the largest, up to what two fp32 sums of these products can differ by."""
    logits = hidden.double() @ weight.double().t()
    chosen = logits.gather(1, ids[:, None]).squeeze(1)
    sizes = (hidden.double().abs() @ weight.double().abs().t()).gather(1, ids[:, None]).squeeze(1)
    assert (chosen + 2 * hidden.shape[1] * 2.0**-24 * sizes >= logits.amax(1)).all()


def first_argmax(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The lowest id of the largest logit, every logit summed in fp64 and in one order.

    A BLAS sums entries at a tile's edge in another order than those inside, so that equal entries get unequal logits.
    """
    logits = (hidden.double()[:, None] * weight.double()).sum(-1)
    ids = torch.arange(weight.shape[0]).expand_as(logits)
    return ids.masked_fill(logits < logits.amax(1, keepdim=True), weight.shape[0]).amin(1)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("rows", [*ODD_SIZES, 8, 9, 32, 33])  # around a register tile of 8 rows and a tile of 32
def test_rows(name, rows):
    require("greedy_head", name)
    hidden, weight = torch.randn(rows, 96), torch.randn(500, 96)
    assert_argmax(on_backend(greedy_head, name)(hidden, pack_head(weight)), hidden, weight)


# Half a block of rows, two blocks, and more rows than go by in one chunk of the depth.
@pytest.mark.parametrize("rows", [1, 40, 600])
def test_large_heads(rows):
    require("greedy_head", "cpp")
    hidden, weight = torch.randn(rows, 768), torch.randn(3001, 768)
    assert_argmax(on_backend(greedy_head, "cpp")(hidden, pack_head(weight)), hidden, weight)


@pytest.mark.parametrize("rows", [1, 5])
def test_products_that_matrix_units_take_for_nothing(rows):
    """Below 2^-126 they count as 0: an entry of many such products may be the largest all the same."""
    require("greedy_head", "cpp")
    weight, hidden = torch.zeros(500, 64), torch.full((rows, 64), 1e-36)
    weight[400] = 2e-3  # 64 products of 2e-39
    weight[3, 0] = 0.05  # one of 5e-38
    ids = on_backend(greedy_head, "cpp")(hidden, pack_head(weight))
    assert ids.tolist() == [400] * rows


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("vocabulary", ODD_SIZES)
def test_vocabularies(name, vocabulary):
    require("greedy_head", name)
    hidden, weight = torch.randn(40, 70), torch.randn(vocabulary, 70)
    assert_argmax(on_backend(greedy_head, name)(hidden, pack_head(weight)), hidden, weight)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("inputs", [*ODD_SIZES, 33, 768])
def test_inputs(name, inputs):
    require("greedy_head", name)
    hidden, weight = torch.randn(9, inputs), torch.randn(300, inputs)
    assert_argmax(on_backend(greedy_head, name)(hidden, pack_head(weight)), hidden, weight)


@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4, 1e-5])
def test_gaps_that_bf16_does_not_see(gap):
    # Every entry is nearly the same vector: bf16 rounds most of them to one, and fp32 must decide among all of them.
    require("greedy_head", "cpp")
    base = torch.randn(256)
    weight = base + gap * torch.randn(2000, 256)
    hidden = torch.randn(12, 256)
    ids = on_backend(greedy_head, "cpp")(hidden, pack_head(weight))
    assert_argmax(ids, hidden, weight)
    rounded = (hidden.bfloat16().double() @ weight.bfloat16().double().t()).argmax(1)
    if gap <= 1e-3:
        assert (ids != rounded).any(), "this case would not notice a product in bf16"


def test_entries_of_very_different_size():
    require("greedy_head", "cpp")
    hidden, weight = (
        torch.randn(16, 128),
        torch.randn(3000, 128) * torch.logspace(-6, 4, 3000)[torch.randperm(3000), None],
    )
    assert_argmax(on_backend(greedy_head, "cpp")(hidden, pack_head(weight)), hidden, weight)
    hidden = hidden * torch.logspace(-30, 15, 16)[:, None]
    assert_argmax(on_backend(greedy_head, "cpp")(hidden, pack_head(weight)), hidden, weight)


@pytest.mark.parametrize("name", BACKENDS)
def test_of_equal_logits_the_lowest_id(name):
    require("greedy_head", name)
    weight = torch.randn(400, 64)
    weight[[90, 91, 250, 399]] = 3 * torch.ones(64)
    hidden = torch.cat([torch.ones(1, 64), torch.zeros(1, 64)])
    assert on_backend(greedy_head, name)(hidden, pack_head(weight)).tolist() == [90, 0]


@pytest.mark.parametrize("name", BACKENDS)
def test_nan_and_inf_are_torch_argmaxs(name):
    require("greedy_head", name)
    hidden, weight = torch.randn(8, 40), torch.randn(200, 40)
    hidden[1, 3] = float("nan")
    hidden[2, 0], hidden[3, 0] = float("inf"), float("-inf")
    hidden[4] = 3e38
    expected = (hidden @ weight.t()).argmax(1)
    ids = on_backend(greedy_head, name)(hidden, pack_head(weight))
    assert ids[[0, 1, 2, 3, 5, 6, 7]].tolist() == expected[[0, 1, 2, 3, 5, 6, 7]].tolist()
    assert 0 <= ids[4] < 200  # the logits overflow to infinities of both signs: any of the largest
    weight[77, 5], weight[150] = float("nan"), 3.4e38  # the latter is beyond bf16's largest number
    ids = on_backend(greedy_head, name)(hidden[5:], pack_head(weight))
    assert ids.tolist() == [77, 77, 77]
    weight[77, 5] = 0.0
    kept = hidden[5:] / 100
    assert on_backend(greedy_head, name)(kept, pack_head(weight)).tolist() == (kept @ weight.t()).argmax(1).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    require("greedy_head", "cpp")
    hidden, weight = lay_out(torch.randn(19, 130), layout), lay_out(torch.randn(700, 130), layout)
    ids = on_backend(greedy_head, "cpp")(hidden, pack_head(weight))
    assert torch.equal(ids, first_argmax(hidden, weight))


def test_nothing_is_written_or_read_outside():
    require("greedy_head", "cpp")
    hidden, weight = torch.randn(35, 129), torch.randn(333, 129)
    with GuardedAllocations() as guarded:
        head = pack_head(weight)
        ids = on_backend(greedy_head, "cpp")(hidden, head)
    guarded.check()
    assert torch.equal(ids, first_argmax(hidden, weight))


def test_a_row_does_not_depend_on_its_batch_nor_on_the_threads():
    require("greedy_head", "cpp")
    hidden, head = torch.randn(70, 200), pack_head(torch.randn(5000, 200))
    whole, threads = greedy_head(hidden, head), torch.get_num_threads()
    assert torch.equal(torch.cat([greedy_head(row, head) for row in hidden.split(1)]), whole)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(greedy_head(hidden, head), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(greedy_head(hidden.view(2, 5, 7, 200), head), whole.view(2, 5, 7))
    assert greedy_head(hidden[:0], head).shape == (0,)


def test_compilation_and_registration():
    require("greedy_head", "cpp")
    hidden, head = torch.randn(9, 70), pack_head(torch.randn(450, 70))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: greedy_head(x, head), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden), greedy_head(hidden, head))
    opcheck("greedy_head", (hidden, head.weight, head.panels, head.errors, head.norms))


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set(isa):
    require("greedy_head", "cpp")
    code = (
        "import torch\nfrom lmvae_fast.kernels.greedy_head import greedy_head, pack_head\n"
        "torch.manual_seed(0)\n"
        "for m, k, v in ((1, 5, 3), (7, 130, 33), (32, 768, 100), (129, 257, 640), (17, 31, 1000)):\n"
        "    x, w = torch.randn(m, k), torch.randn(v, k)\n"
        "    assert torch.equal(greedy_head(x, pack_head(w)), (x.double() @ w.double().t()).argmax(1)), (m, k, v)\n"
    )
    # without the matrix units, which only an unset LMVAE_CPU_ISA leaves in use
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "LMVAE_CPU_ISA": isa})


def test_bad_input_is_named():
    head = pack_head(torch.randn(40, 16))
    with raises_naming(ValueError, "weight", "[4]"):
        pack_head(torch.randn(4))
    with raises_naming(TypeError, "weight", "float64"):
        pack_head(torch.randn(4, 4, dtype=torch.float64))
    with raises_naming(ValueError, "hidden", "[4, 15]", "[40, 16]"):
        greedy_head(torch.randn(4, 15), head)
    with raises_naming(TypeError, "hidden", "float64"):
        greedy_head(torch.randn(4, 16, dtype=torch.float64), head)
    with raises_naming(ValueError, "gradient"):
        greedy_head(torch.randn(4, 16, requires_grad=True), head)
