"""Texts cut into prompt and response: what comes back is tokenised to the same tokens, or the text is dropped."""

from __future__ import annotations

import pytest

from lmvae_fast.data import cut_texts, read_texts
from lmvae_fast.data.prompt_readers import LabelledText
from lmvae_fast.errors import DataError
from lmvae_fast.testing import tiny_tokenizer


class WithStart:
    """A tokenizer that writes a begin-of-text, and spells some bytes as nothing that reads back."""

    def __init__(self):
        self.inner = tiny_tokenizer()
        self.all_special_ids = self.inner.all_special_ids

    def __call__(self, text):
        return {"input_ids": [1, *self.inner(text)["input_ids"]]}

    def decode(self, token_ids, **options):
        return self.inner.decode(token_ids, **options)


def test_prompt_and_response_are_the_first_tokens_and_the_rest():
    tokenizer = tiny_tokenizer()
    texts = ["the sun is a star and water is a kind of liquid", LabelledText("plants need light to grow", "x"), "ice"]
    dataset = cut_texts(texts, tokenizer, prompt_tokens=3, response_tokens=6)
    assert len(dataset) == 2 and dataset.report.dropped == {"too short": 1} and dataset.labels == [None, "x"]
    for row in dataset:
        assert len(tokenizer(row.prompt)["input_ids"]) == 3
        whole = tokenizer(row.prompt + row.response)["input_ids"]
        assert whole == tokenizer(row.prompt)["input_ids"] + whole[3:] and len(whole) <= 9
    assert len(tokenizer(dataset[0].prompt + dataset[0].response)["input_ids"]) == 9


def test_begin_of_text_is_one_of_the_prompts_tokens():
    text = "the sun is a star and water is a kind of liquid"
    plain = cut_texts([text], tiny_tokenizer(), prompt_tokens=3, response_tokens=6)[0]
    started = cut_texts([text], WithStart(), prompt_tokens=4, response_tokens=6)[0]
    assert plain == started


def test_a_text_is_dropped_where_its_tokens_do_not_read_back():
    """A character of three bytes, of which the cut leaves one or two, is lost with them; four tokens may be."""
    snow = "the sun is a star 雪"
    tokenizer = tiny_tokenizer()
    length = len(tokenizer(snow)["input_ids"])
    kept = cut_texts([snow], tokenizer, prompt_tokens=3, response_tokens=length - 4)[0]
    assert kept.prompt + kept.response == " the sun is a star "
    with pytest.raises(DataError, match="cannot be read back"):
        cut_texts(["雪" * 30], _Scrambled(), prompt_tokens=3, response_tokens=9)


class _Scrambled(WithStart):
    """No text of it is tokenised to itself."""

    def __call__(self, text):
        ids = self.inner(text)["input_ids"]
        return {"input_ids": [*ids[1:], ids[0]]}


def test_lengths_are_checked():
    for options in ({"prompt_tokens": 0, "response_tokens": 4}, {"prompt_tokens": 4, "response_tokens": 1.5}):
        with pytest.raises(DataError, match="out of range"):
            cut_texts(["a"], tiny_tokenizer(), **options)
    with pytest.raises(DataError, match="no text is long enough"):
        cut_texts(["a"], tiny_tokenizer(), prompt_tokens=4, response_tokens=4)


def test_real_reviews_are_cut(shared):
    texts = read_texts(shared / "data" / "yelp_sentences_valid.txt", layout="yelp", limit=300)
    dataset = cut_texts(texts, tiny_tokenizer(), prompt_tokens=8, response_tokens=32)
    report = dataset.report
    assert report.read == 300 and report.kept + sum(report.dropped.values()) == 300 and report.kept > 200
    assert all(row.label in ("0", "1") for row in dataset)


def test_a_text_that_spells_a_special_token_is_dropped():
    texts = ["the sun is a </s> star and water is a kind of liquid", "the sun is a star and water is a kind of liquid"]
    dataset = cut_texts(texts, tiny_tokenizer(), prompt_tokens=3, response_tokens=9)
    assert len(dataset) == 1 and dataset.report.dropped == {"spells a special token": 1}
