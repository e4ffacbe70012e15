"""Scores of given texts against the log-probabilities that generation itself reports."""

from __future__ import annotations

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.errors import DataError, LatentError
from lmvae_fast.testing import make_model

TEXTS = ["the sun", "ice", "a cat is a", "plants need light", "the sun is"]


@pytest.mark.parametrize("objective", ["elbo", "langvae-0.6"])
def test_score_is_what_a_forced_sentence_costs(objective):
    """Each token's log-probability, read off the decoder one prompt further at a time."""
    model = make_model("gpt2", objective=objective).eval()
    z = 2 * torch.randn(len(TEXTS), 6)
    got = lf.score(model, z, TEXTS, batch_size=2)
    tokenizer = model.decoder.tokenizer
    for row, ids in enumerate(tokenizer.encode(TEXTS)):
        labels = [*ids, tokenizer.eos_token_id][: model.config.max_len]
        total = 0.0
        with torch.no_grad():
            injection = model.inject(z[row : row + 1])
            cache = model.decoder.new_cache(injection, batch=1, max_tokens=len(labels))
            cache.place(torch.tensor([0]), injection)
            for read, predicted in zip([tokenizer.bos_token_id, *labels], labels, strict=False):
                logits = model.decoder.step(torch.tensor([read]), cache, injection)
                total += logits.log_softmax(-1)[0, predicted].item()
        assert got[row].item() == pytest.approx(total, rel=1e-5)


def test_bad_input_is_refused():
    model = make_model("gpt2")
    with pytest.raises(DataError, match="latent of its own"):
        lf.score(model, torch.zeros(2, 6), ["ice"])
    with pytest.raises(DataError, match="one string"):
        lf.score(model, torch.zeros(3, 6), "ice")
    with pytest.raises(DataError, match="too long"):
        lf.score(model, torch.zeros(1, 6), ["the sun " * 20])
    with pytest.raises(DataError, match="empty"):
        lf.score(model, torch.zeros(2, 6), ["ice", " "])
    with pytest.raises(LatentError, match="NaN"):
        lf.score(model, torch.full((1, 6), float("nan")), ["ice"])
    assert lf.score(model, torch.zeros(0, 6), []).shape == (0,)
