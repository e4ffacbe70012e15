"""What layers may ask of our attention: nothing that it would ignore."""

from __future__ import annotations

import pytest
from torch import nn

from lmvae_fast.errors import UnsupportedDecoderError
from lmvae_fast.models.decoder.attention import refuse_unknown


def test_what_a_model_returns_besides_is_no_feature_of_attention():
    """transformers 5.24 hands gpt_oss's output_router_logits through to attention, 5.23 does not."""
    refuse_unknown(nn.Linear(1, 1), 0.0, {"output_router_logits": False, "output_attentions": True, "layer_idx": 3})


@pytest.mark.parametrize(
    ("dropout", "other", "message"),
    [(0.0, {"s_aux": 1}, "Linear asks for attention features we do not honour.*s_aux"), (0.1, {}, "dropout.*0.1")],
)
def test_what_would_be_ignored_is_refused(dropout, other, message):
    with pytest.raises(UnsupportedDecoderError, match=message):
        refuse_unknown(nn.Linear(1, 1), dropout, other)


def test_what_is_not_given_is_not_asked_for():
    refuse_unknown(nn.Linear(1, 1), 0.0, {"s_aux": None})
