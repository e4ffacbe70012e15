"""What a module's forward takes."""

from __future__ import annotations

import pytest
from torch import nn

from lmvae_fast.models.decoder.way import cache_argument
from lmvae_fast.testing import tiny_decoder


class Renamed(nn.Module):
    """As from transformers 5.24 on."""

    def forward(self, input_ids, cache=None, use_cache=None):
        return input_ids


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_cache_goes_by_either_name(family):
    model = tiny_decoder(family)
    name = cache_argument(model)
    out = model(input_ids=model.dummy_inputs["input_ids"][:, :2] % 50, use_cache=True, **{name: None})
    assert name in ("cache", "past_key_values") and out is not None
    assert cache_argument(Renamed()) == "cache" and cache_argument(nn.Linear(2, 2)) is None
