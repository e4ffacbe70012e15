"""The published arithmetic of compute against Optimus, reproduced from the models' shapes."""

from __future__ import annotations

import pytest

from benchmarks.compute.pairs import LANGVAE_PAIRS, cvae, published_reduction, rows
from lmvae_fast.profiling.counts import StepShape

SHAPE = StepShape(batch=2, tokens=4, latent_dim=128, max_len=32)


@pytest.fixture(scope="module")
def bert_rows():
    return rows([pair for pair in LANGVAE_PAIRS if pair[0] == "bert-base-cased"], SHAPE, ("langvae", "optimus"))


def test_langvae_trainable_parameters(bert_rows):
    millions = {row["decoder"]: round(row["langvae"]["trainable"] / 1e6, 2) for row in bert_rows}
    assert millions == {"gpt2": 78.66, "qwen2.5-3b": 78.66, "llama-3.2-3b": 244.31, "mistral-7b-v0.3": 279.18}


def test_published_parameter_reduction(bert_rows):
    figures = published_reduction(bert_rows)
    assert figures["share_qwen2.5-3b"] == pytest.approx(0.0246, abs=5e-5)
    assert figures["share_llama-3.2-3b"] == pytest.approx(0.0736, abs=5e-5)
    assert figures["share_mistral-7b-v0.3"] == pytest.approx(0.0380, abs=5e-5)
    assert figures["mean_reduction_of_large"] == pytest.approx(0.955, abs=5e-4)  # "over 95 %"
    assert figures["reduction_of_gpt2"] == pytest.approx(0.66, abs=5e-3)


def test_flops_fall_by_far_less_than_parameters(bert_rows):
    """What the published figure does not say: a frozen decoder still runs forward and backward."""
    for row in bert_rows:
        saved = 1 - row["langvae"]["flops"] / row["optimus"]["flops"]
        assert 0.3 < saved < 0.7


def test_cvae_sizes_follow_from_its_formulas():
    figures = cvae(SHAPE)
    assert figures["encoder_parameters"] == 453_091_344
    assert figures["adapter_parameters"] == 34_277_376
    assert figures["g_skip_parameters"] == 16_920_576
