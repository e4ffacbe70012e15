"""Figures of generated texts under their names."""

from __future__ import annotations

import numpy as np
import pytest

from lmvae_fast.errors import DataError
from lmvae_fast.probes.generation_quality import generation_quality
from lmvae_fast.probes.text import frechet_distance, self_bleu

TEXTS = ["a cat sleeps on a mat", "most bears eat fish", "plants need light", "a cat eats fish"]


def test_what_the_inputs_allow():
    alone = generation_quality(TEXTS)
    assert list(alone) == ["self_bleu", "distinct_1", "distinct_2", "distinct_3", "distinct_4"]
    assert alone["self_bleu"] == self_bleu(TEXTS)
    assert "distinct_4" not in generation_quality(["a b c", "d e"])
    against = generation_quality(TEXTS, TEXTS, paired=True)
    assert against["bleu"] == pytest.approx(100.0) and against["ter"] == 0.0
    source = np.random.default_rng(0)
    a, b = source.normal(size=(4, 3)), source.normal(size=(60, 3))
    apart = generation_quality(TEXTS, embeddings=a, reference_embeddings=b, seeds=(0,))
    assert apart["frechet_distance"] == frechet_distance(a, b) and 0.0 <= apart["mauve"] <= 1.0


def test_refusals():
    with pytest.raises(DataError, match="generated must be a list"):
        generation_quality(["one"])
    with pytest.raises(DataError, match="needs references"):
        generation_quality(TEXTS, paired=True)
    with pytest.raises(DataError, match="both sides need embeddings"):
        generation_quality(TEXTS, embeddings=np.eye(4))
    with pytest.raises(DataError, match="a row for each text"):
        generation_quality(TEXTS, embeddings=np.eye(5), reference_embeddings=np.eye(5))
