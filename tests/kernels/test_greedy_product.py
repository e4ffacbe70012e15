"""greedy_product: the argmax of a product that is not written, and the largest logit itself."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.backend import backend
from lmvae_fast.kernels.greedy_head import MOST_ROWS, greedy_product
from lmvae_fast.models.decoder.greedy_token import greedy_tokens
from lmvae_fast.testing import make_model

from .common import LAYOUTS, GuardedAllocations, lay_out, on_backend, opcheck, raises_naming, require

BACKENDS = ("reference", "triton")
# The interpreter multiplies bf16 wrongly without an error: half types are tested by fp16.
DTYPES = (torch.float32, torch.float16)


def assert_greatest(found, hidden, weight):
    """The logit is that of the id, and the largest, up to what two sums of these products can differ by and a rounding."""
    ids, logits = found
    assert ids.dtype == torch.int64 and logits.dtype == torch.float32
    exact = hidden.double() @ weight.double().t()
    sizes = hidden.double().abs() @ weight.double().abs().t()
    chosen, size = (each.gather(1, ids[:, None]).squeeze(1) for each in (exact, sizes))
    allowed = 2 * hidden.shape[1] * 2.0**-24 * size + 2 * torch.finfo(hidden.dtype).eps * chosen.abs()
    assert (chosen + allowed >= exact.amax(1)).all()
    assert ((logits.double() - chosen).abs() <= allowed + 1e-30).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "inputs"), [(1, 1, 1), (3, 65, 40), (17, 200, 129), (65, 129, 64), (5, 1500, 8)]
)
def test_the_greatest_logit_of_every_row(name, dtype, rows, vocabulary, inputs):
    require("greedy_product", name)
    hidden, weight = torch.randn(rows, inputs).to(dtype), torch.randn(vocabulary, inputs).to(dtype)
    assert_greatest(on_backend(greedy_product, name)(hidden, weight), hidden, weight)


@pytest.mark.parametrize("name", BACKENDS)
def test_negative_logits_and_a_block_that_ends_early(name):
    require("greedy_product", name)
    hidden, weight = torch.ones(2, 16), -torch.rand(70, 16) - 1  # what is masked must not be taken for a logit of 0
    weight[67] = -0.5
    ids, logits = on_backend(greedy_product, name)(hidden, weight)
    assert ids.tolist() == [67, 67]
    assert logits.tolist() == [-8.0, -8.0]


@pytest.mark.parametrize("name", BACKENDS)
def test_of_equal_logits_the_lowest_id(name):
    require("greedy_product", name)
    weight = torch.randn(400, 64)
    weight[[90, 91, 250, 399]] = 3 * torch.ones(64)
    hidden = torch.cat([torch.ones(1, 64), torch.zeros(1, 64), -torch.zeros(1, 64)])
    ids, logits = on_backend(greedy_product, name)(hidden, weight)
    assert ids.tolist() == [90, 0, 0]
    assert logits.tolist() == [192.0, 0.0, 0.0]


def test_logits_are_rounded_before_they_are_compared():
    """As a product in this dtype rounds them: tokens are those of logits that were written."""
    require("greedy_product", "triton")
    weight = torch.ones(100, 4, dtype=torch.float16)
    hidden = torch.tensor([[1024.0, 0.25, 0.0, 0.0]], dtype=torch.float16)
    weight[40, 1] = 1.5  # 1024.375, which fp16 has not
    ids, logits = on_backend(greedy_product, "triton")(hidden, weight)
    assert (ids.item(), logits.item()) == (0, 1024.0)
    weight[40, 1] = 4.0
    ids, logits = on_backend(greedy_product, "triton")(hidden, weight)
    assert (ids.item(), logits.item()) == (40, 1025.0)


@pytest.mark.parametrize("name", BACKENDS)
def test_nan_counts_as_the_largest_and_infinity_as_itself(name):
    require("greedy_product", name)
    hidden, weight = torch.randn(4, 40), torch.randn(200, 40)
    hidden[1, 3] = float("nan")
    weight[:, 0] = weight[:, 0].abs() + 0.1
    hidden[2, 0], hidden[3, 0] = float("inf"), float("-inf")
    ids, logits = on_backend(greedy_product, name)(hidden, weight)
    assert ids[1:].tolist() == [0, 0, 0]
    assert logits[1].isnan()
    assert logits[2:].tolist() == [float("inf"), float("-inf")]
    weight[77, 5] = float("nan")
    ids, logits = on_backend(greedy_product, name)(hidden[:1], weight)
    assert ids.tolist() == [77] and logits.isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    require("greedy_product", "triton")
    hidden, weight = lay_out(torch.randn(9, 70), layout), lay_out(torch.randn(130, 70), layout)
    assert_greatest(on_backend(greedy_product, "triton")(hidden, weight), hidden, weight)


def test_leading_dimensions_and_none():
    hidden, weight = torch.randn(2, 3, 8), torch.randn(20, 8)
    ids, logits = greedy_product(hidden, weight)
    assert ids.shape == logits.shape == (2, 3)
    assert greedy_product(hidden[:0], weight)[0].shape == (0, 3)


def test_nothing_is_written_or_read_outside():
    require("greedy_product", "triton")
    hidden, weight = torch.randn(19, 129), torch.randn(133, 129)
    with GuardedAllocations() as guarded:
        found = on_backend(greedy_product, "triton")(hidden, weight)
    guarded.check()
    assert_greatest(found, hidden, weight)


def test_opcheck():
    require("greedy_product", "triton")
    opcheck("greedy_product", (torch.randn(3, 16), torch.randn(40, 16)), "triton")


def test_bad_input():
    hidden, weight = torch.randn(3, 8), torch.randn(20, 8)
    with raises_naming(ValueError, "[3, 8]", "[20, 7]"):
        greedy_product(hidden, weight[:, :7])
    with raises_naming(ValueError, "[0, 8]"):
        greedy_product(hidden, weight[:0])
    with raises_naming(TypeError, "float32", "float16"):
        greedy_product(hidden, weight.half())
    with raises_naming(ValueError, "hidden", "no gradient"):
        greedy_product(hidden.clone().requires_grad_(), weight)


def test_greedy_decoding_goes_through_it_for_as_many_rows_as_it_is_for():
    require("greedy_product", "triton")
    model = make_model("gpt2").eval()
    decoder, made = model.decoder, []
    logits = lambda hidden: made.append(len(hidden)) or decoder.logits(hidden)  # noqa: E731
    hidden = torch.randn(5, decoder.hidden_size)
    hidden[2] = float("inf")
    finite, head = torch.ones(5, dtype=torch.bool), decoder.model.get_output_embeddings()
    with torch.no_grad(), backend("triton"):
        ids = greedy_tokens(hidden, head, logits, only_a_product=True, finite=finite)
        assert not made
        assert finite.tolist() == [True, True, False, True, True]
        assert torch.equal(ids[[0, 1, 3, 4]], decoder.logits(hidden)[[0, 1, 3, 4]].argmax(-1))
        greedy_tokens(hidden.repeat(MOST_ROWS[torch.float32], 1), head, logits, only_a_product=True)
        greedy_tokens(hidden, head, logits, only_a_product=False)
    assert made == [5 * MOST_ROWS[torch.float32], 5]
