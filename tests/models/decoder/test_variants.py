"""Rotations and windows past the lengths that configurations name, a sample of `make families`."""

from __future__ import annotations

import pytest

from lmvae_fast.models.decoder import examination
from lmvae_fast.testing.family_check import check_decoder, wrong
from lmvae_fast.testing.variants import SHORT, check_variant, variant_model, variants

SAMPLE = {
    "llama:linear": "right",
    "llama:llama3": "right",
    "llama:dynamic": "refused",
    "mistral:yarn:window": "right",
    "qwen2:longrope:window": "refused",
    "phi3:longrope": "refused",
    "gemma2:yarn:window": "right",
    "gemma3_text:longrope:window": "refused",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_variant_is_right_or_refused_past_its_original_length(name):
    assert name in set(variants())
    found = check_variant(name)
    assert found["status"] == SAMPLE[name], found
    if found["status"] == "refused":
        assert f"reach position {SHORT}" in found["past"]["no_memory"]


@pytest.mark.parametrize("name", ["phi3:longrope", "gemma3_text:longrope:window"])
def test_a_rotation_that_changes_with_the_length_is_seen_where_it_is_not_refused(name, monkeypatch):
    """The check itself finds what the limit keeps out: one pass turns all positions alike, one token after another does not."""
    monkeypatch.setattr(examination, "_one_turn_below", lambda config: None)
    found = check_decoder(variant_model(name, original=SHORT))
    assert {"no_memory", "prefix"} <= set(wrong(found)), found
