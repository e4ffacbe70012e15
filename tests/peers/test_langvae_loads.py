"""``make test-peers``: the real LangVAE reads our checkpoints and agrees with the reference and the parallel pass."""

from __future__ import annotations

import pytest

from tests.peers.check_langvae_loads import NEW_DECODERS, check_golden, check_labels, check_new_parts, failures

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("name", ["langvae_gpt2", "langvae_llama"])
@pytest.mark.parametrize("check", [check_golden, check_labels])
def test_langvae_loads_and_agrees(shared, tmp_path, name, check):
    assert failures(check(shared / "golden" / name, tmp_path)) == []


@pytest.mark.parametrize("decoder", NEW_DECODERS)
def test_langvae_reads_parts_that_transformers_5_saved(tmp_path, decoder):
    assert failures(check_new_parts(decoder, tmp_path)) == []
