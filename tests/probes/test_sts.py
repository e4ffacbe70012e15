"""STS: correlations of MiniLM's embeddings as recorded, closed forms, bad files."""

from __future__ import annotations

import numpy as np
import pytest

from lmvae_fast.errors import ConfigError, DataError, LatentError
from lmvae_fast.probes.sts import read_pairs, similarity, spearman


@pytest.fixture
def pairs(arrays):
    file = arrays("sts/sts.npz")
    return file["a"].astype(np.float64), file["b"].astype(np.float64), file["gold"]


@pytest.mark.parametrize("kind", ["cosine", "dot", "negative_euclidean", "negative_manhattan"])
def test_correlations_of_the_record(pairs, record, kind):
    found, want = spearman(*pairs, kind), record("sts/sts.json")[kind]
    assert found.value == pytest.approx(want["spearman_x100"], abs=1e-6)
    if "pearson_x100" in want:
        assert found.details["pearson"] == pytest.approx(want["pearson_x100"], abs=1e-6)


def test_on_32_components(pairs, record):
    a, b, gold = pairs
    both = np.concatenate([a, b])
    both = both - both.mean(axis=0)
    both = both @ np.linalg.svd(both, full_matrices=False)[2][:32].T
    found = spearman(both[: len(a)], both[len(a) :], gold)
    assert found.value == pytest.approx(record("sts/sts.json")["pca32_cosine_spearman_x100"], abs=1e-6)


def test_closed_forms():
    a = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    b = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [1.0, 1.0]])
    np.testing.assert_allclose(similarity(a, b), [1.0, np.sqrt(0.5), 0.0, 0.0])
    assert spearman(a[:3], b[:3], [5, 3, 0]).value == pytest.approx(100.0)
    assert spearman(a[:3], b[:3], [0, 3, 5]).value == pytest.approx(-100.0)
    # Ties share the mean of their ranks: ranks 1.5, 1.5, 3 against 3, 2, 1.
    tied = spearman(a[:3], b[:3], [1, 1, 0])
    assert tied.value == pytest.approx(100.0 * np.corrcoef([3, 2, 1], [2.5, 2.5, 1])[0, 1])


def test_pairs_of_a_file(shared, tmp_path):
    first, second, gold = read_pairs(shared / "data" / "stsb_en_dev.csv")
    assert len(first) == len(second) == len(gold) == 1500 and gold.max() == 5.0
    path = tmp_path / "pairs.csv"
    path.write_text("a,b,1\nc,d,high\n")
    with pytest.raises(DataError, match="line 2: not a pair with a score"):
        read_pairs(path)
    path.write_text("")
    with pytest.raises(DataError, match="holds no pair"):
        read_pairs(path)
    with pytest.raises(DataError, match="there is no file"):
        read_pairs(tmp_path / "none.csv")


def test_refusals(pairs):
    a, b, gold = pairs
    with pytest.raises(DataError, match="one shape"):
        spearman(a, b[:5], gold)
    with pytest.raises(DataError, match="finite score for each pair"):
        spearman(a, b, gold[:5])
    with pytest.raises(DataError, match="same gold score"):
        spearman(a, b, np.ones(len(a)))
    with pytest.raises(DataError, match="same similarity"):
        spearman(np.ones((3, 2)), np.ones((3, 2)), [1, 2, 3])
    with pytest.raises(ConfigError, match="unknown kind"):
        spearman(a, b, gold, "jaccard")
    with pytest.raises(LatentError, match="a is not finite"):
        spearman(np.where(a == a[0, 0], np.nan, a), b, gold)
