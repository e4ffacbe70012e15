"""Kinds of text encoder, tiny and random: padding, neighbours, the longest text and the width. All: `make families`."""

from __future__ import annotations

import pytest

from lmvae_fast.testing.encoder_check import check_type

KINDS = {
    "bart": (32, 24),  # of an encoder-decoder its encoder
    "bert": (32, 24),
    "ibert": (32, 23),  # positions behind the padding token's, in a table that is no nn.Embedding
    "led": (32, 24),  # its halves have limits of their own
    "roberta": (32, 23),
    "t5": (32, None),
    "xmod": (32, 23),
}


@pytest.mark.parametrize("model_type", KINDS)
def test_a_kind_of_encoder_gives_features_of_its_text_alone(model_type):
    found = check_type(model_type)
    assert found["status"] == "right", found
    assert (found["width"], found["longest"]) == KINDS[model_type]


def test_an_encoder_that_mixes_its_padding_in_is_refused():
    found = check_type("fnet")
    assert found["status"] == "refused" and "padding" in found["reason"]
