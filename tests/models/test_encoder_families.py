"""Kinds of text encoder, tiny and random: padding, neighbours, the longest text and the width. All: `make families`."""

from __future__ import annotations

import pytest

from lmvae_fast.errors import ConfigError
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.testing import tiny_tokenizer
from lmvae_fast.testing.encoder_check import check_encoder
from lmvae_fast.testing.mapped_types import tiny_encoder_of

KINDS = {
    "audioflamingo3": (32, 24),  # its language model's
    "bart": (32, 24),  # of an encoder-decoder its encoder
    "bert": (32, 24),
    "ibert": (32, 23),  # positions behind the padding token's, in a table that is no nn.Embedding
    "led": (32, 24),  # its halves have limits of their own
    "roberta": (32, 23),
    "t5": (32, None),
    "xmod": (32, 23),
}


def check(model_type):
    tokenizer = tiny_tokenizer()
    return check_encoder(tiny_encoder_of(model_type, len(tokenizer)), tokenizer)


@pytest.mark.parametrize("model_type", KINDS)
def test_a_kind_of_encoder_gives_features_of_its_text_alone(model_type):
    found = check(model_type)
    assert found["status"] == "right", found
    assert (found["width"], found["longest"]) == KINDS[model_type]


@pytest.mark.parametrize(
    ("model_type", "reason"),
    {
        "fnet": "does not leave its padding out",
        "funnel": "does not leave its padding out",
        "fsmt": "no configuration of its own",
        "perceiver": "no table of token embeddings",
        "voxtral_realtime": "does not read text alone",
    }.items(),
)
def test_an_encoder_that_cannot_be_one_is_refused_for_what_it_is(model_type, reason):
    with pytest.raises(ConfigError, match=reason):
        check(model_type)


def test_the_longest_text_is_that_of_the_language_model_inside():
    """MusicFlamingo's own ``max_position_embeddings`` is the base of its rotation; its text's limit is elsewhere."""
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tiny_encoder_of("musicflamingo", len(tokenizer)), tokenizer)
    assert encoder.max_tokens == 24 and encoder.tokenize(["the sun " * 40])[0].shape == (1, 24)
