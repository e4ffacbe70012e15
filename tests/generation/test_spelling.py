"""Decoded ids as text: what a response is when it is put behind its prompt again."""

from __future__ import annotations

import pytest

from lmvae_fast.generation.spelling import responses, spelled
from lmvae_fast.testing import make_model


@pytest.mark.parametrize("end", [None, "end", " food"])
def test_a_response_is_spelled_as_it_stands_behind_its_prompt(end):
    """A space between prompt and response belongs to the response, and so does a token that ended it and is not the end."""
    model = make_model("llama", system="cvae", latent_dim=6, queries=2)
    tokenizer = model.decoder.tokenizer
    prompt = " ".join(["the sun is"] * 4)
    (read,), (ids,) = tokenizer.encode_whole([prompt]), tokenizer.encode([" a star"])
    stop = tokenizer.eos_token_id if end == "end" else None if end is None else tokenizer.encode([end])[0][-1]
    found = responses(model, [(tuple(read), ids, stop)])
    assert found == [" a star" if end != " food" else " a star" + tokenizer.decode([[stop]])[0]]
    assert spelled(model, [((), ids)]) == ["a star"]


def test_special_tokens_are_kept_for_the_next_reading_and_end_what_is_shown():
    model = make_model("llama", system="cvae", latent_dim=6, queries=2)
    tokenizer = model.decoder.tokenizer
    (first,), (second,) = tokenizer.encode([" a star"]), tokenizer.encode([" food"])
    ids = [*first, tokenizer.bos_token_id, *second]
    assert responses(model, [((1, 5), ids, None)]) == [" a star<s> food"]
    assert spelled(model, [((), ids)]) == ["a star"]


def test_sentences_have_no_response():
    model = make_model("llama")
    assert responses(model, [((1,), [5, 6], 2)]) == [None]
