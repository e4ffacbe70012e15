"""Figures of texts against sacrebleu's, nltk's, the CVAE repository's, mauve-text's and pytorch-fid's records."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lmvae_fast.errors import ConfigError, DataError, LatentError
from lmvae_fast.probes.text import (
    distinct_n,
    frechet_distance,
    mauve,
    mauve_from_histograms,
    nltk_bleu,
    nmt_bleu,
    reference_overlap,
    self_bleu,
)

EXACT = 1e-9


@pytest.fixture
def metrics(record):
    return record("text/text_metrics.json")


def test_reference_overlap_is_sacrebleu(metrics):
    found, want = reference_overlap(metrics["hypotheses"], metrics["references"]), metrics["sacrebleu"]
    assert found["bleu"].value == pytest.approx(want["corpus_bleu"], abs=EXACT)
    np.testing.assert_allclose(found["bleu"].details["precisions"], want["precisions"], rtol=0, atol=EXACT)
    np.testing.assert_allclose(found["bleu"].details["sentences"], want["sentence_bleu"], rtol=0, atol=EXACT)
    for name in ("chrf", "chrf++", "ter"):
        assert found[name].value == pytest.approx(want[name], abs=EXACT)


@pytest.mark.parametrize("method", [0, 1, 2, 3, 4, 5, 7])
def test_bleu_of_nltk(metrics, method):
    pytest.importorskip("nltk", reason="nltk is not installed")
    found, want = nltk_bleu(metrics["hypotheses"], metrics["references"], method=method), metrics["nltk"]
    np.testing.assert_allclose(found.details["sentences"], want[f"sentence_bleu4_method{method}"], rtol=0, atol=EXACT)
    assert found.details["corpus"] == pytest.approx(want["corpus_bleu4_no_smoothing"], abs=EXACT)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bleu_of_the_cvae_repository(metrics, n):
    found = nmt_bleu(metrics["hypotheses"], [[text] for text in metrics["references"]], n)
    assert found.value == pytest.approx(metrics["evaluate_bleu_smooth_13a_as_CVAE_repository"][f"bleu-{n}"], abs=EXACT)
    several = nmt_bleu(["a b c", "d e"], [["a x", "a b c d"], ["e d", "d e"]], n=1)
    # Five of five words; the shortest references have two words each, so there is no penalty.
    assert several.value == 1.0


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_self_bleu_is_that_of_texygen(metrics, n):
    found, want = self_bleu(metrics["hypotheses"], n), metrics["self_bleu_nltk_method1"][f"n{n}"]
    assert found.value == pytest.approx(want["mean"], abs=EXACT)
    np.testing.assert_allclose(found.details["sentences"], want["each"], rtol=0, atol=EXACT)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_self_bleu_is_that_of_the_cvae_repository(metrics, n):
    want = metrics["evaluate_bleu_smooth_13a_as_CVAE_repository"][f"self-bleu-{n}"]
    assert self_bleu(metrics["hypotheses"], n, form="nmt").value == pytest.approx(want, abs=EXACT)


def test_self_bleu_counts_what_nltk_counts():
    """Ties of counts and of lengths, repeated sentences, sentences shorter than n, none in common."""
    library = pytest.importorskip("nltk.translate.bleu_score", reason="nltk is not installed")
    source = np.random.default_rng(0)
    for _ in range(5):
        rows = [" ".join(source.choice(list("aabbcde"), size=size)) for size in source.integers(1, 9, size=12)]
        rows += [rows[0], "x y z", rows[3]]
        tokens = [row.split() for row in rows]
        method = library.SmoothingFunction().method1
        want = [
            library.sentence_bleu(tokens[:k] + tokens[k + 1 :], row, smoothing_function=method)
            for k, row in enumerate(tokens)
        ]
        np.testing.assert_allclose(self_bleu(rows).details["sentences"], want, rtol=0, atol=EXACT)
    assert self_bleu(["a b c d e"] * 3).value == pytest.approx(1.0)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_distinct_n(metrics, n):
    # The record's tokens are lower-cased.
    lowered, want = [text.lower() for text in metrics["hypotheses"]], metrics["distinct_n"][f"n{n}"]
    assert distinct_n(lowered, n).value == pytest.approx(want["corpus_unique_over_ngrams"], abs=EXACT)
    by_tokens = distinct_n(lowered, n, form="tokens")
    assert by_tokens.value == pytest.approx(want["corpus_unique_over_tokens_Li2016"], abs=EXACT)
    assert distinct_n(lowered, n, form="sentences").value == pytest.approx(want["mean_of_sentences"], abs=EXACT)
    assert (by_tokens.details["unique"], by_tokens.details["ngrams"]) == (want["unique"], want["ngrams"])


def test_mauve_of_recorded_histograms(metrics):
    for name, want in metrics["mauve"].items():
        found = mauve_from_histograms(want["p_hist"], want["q_hist"])
        assert found.value == pytest.approx(want["mauve"], abs=1e-6), name
        if want["divergence_curve"] is not None:
            mine = found.details["curve"]
            recorded = np.array(want["divergence_curve"])
            np.testing.assert_allclose(mine[np.argsort(mine[:, 1])], recorded[np.argsort(recorded[:, 1])], atol=1e-6)
    same = mauve_from_histograms([1, 2, 3], [2, 4, 6])
    assert same.value == pytest.approx(1.0) and mauve_from_histograms([1, 0], [0, 1]).value < 0.05


def test_mauve_of_embeddings_depends_on_the_seed(metrics, arrays):
    sets = arrays("text/embedding_sets.npz")
    near, far = mauve(sets["a"], sets["b"], clusters=20), mauve(sets["a"], sets["c"], clusters=20)
    # Recorded over three seeds of another k-means: .998 to .999 and .028 to .044.
    assert near.value == pytest.approx(0.9985, abs=5e-3) and far.value == pytest.approx(0.034, abs=0.03)
    assert near.choices["seeds"] == [0, 1, 2] and far.spread is not None and len(far.details["per_seed"]) == 3


def test_mauve_by_its_authors_package(metrics, arrays):
    package = pytest.importorskip("mauve", reason="mauve-text is not installed")
    sets = arrays("text/embedding_sets.npz")
    found = mauve(sets["a"], sets["c"], clusters=20, seeds=(25, 26), package="mauve-text")
    theirs = [
        package.compute_mauve(p_features=sets["a"], q_features=sets["c"], num_buckets=20, seed=seed).mauve
        for seed in (25, 26)
    ]
    assert found.details["per_seed"] == pytest.approx(theirs, abs=1e-6) and found.choices["package"] == "mauve-text"
    # Two k-means of the same points, and two definitions of the same clusters: near, not equal.
    assert found.value == pytest.approx(mauve(sets["a"], sets["c"], clusters=20).value, abs=0.03)
    with pytest.raises(ConfigError, match="package"):
        mauve(sets["a"], sets["c"], package="faiss")


def test_frechet_distance(metrics, arrays):
    sets, want = arrays("text/embedding_sets.npz"), metrics["frechet_distance_pytorch_fid_0.3.0"]
    for other in "bc":
        for width in (16, 384):
            found = frechet_distance(sets["a"][:, :width], sets[other][:, :width])
            assert found.value == pytest.approx(want[f"a_{other}_first{width}"], rel=1e-4)
    assert frechet_distance(sets["a"], sets["a"]).value == pytest.approx(0.0, abs=1e-9)
    normal = np.random.default_rng(0).normal(size=(50, 3))
    assert frechet_distance(normal, normal + np.array([3.0, 0.0, 4.0])).value == pytest.approx(25.0)
    assert frechet_distance(normal[:, :1], 3.0 * normal[:, :1] + normal[:, :1].mean()).value >= 0.0


def test_refusals():
    with pytest.raises(DataError, match="equally many"):
        reference_overlap(["a"], ["a", "b"])
    with pytest.raises(DataError, match="list of strings"):
        reference_overlap("a b", ["a b"])
    with pytest.raises(DataError, match="list of references"):
        nmt_bleu(["a"], ["a"])
    with pytest.raises(ConfigError, match="method is out of range"):
        nltk_bleu(["a"], ["a"], method=8)
    with pytest.raises(DataError, match="compares sentences"):
        self_bleu(["one"])
    with pytest.raises(ConfigError, match="unknown form"):
        self_bleu(["one", "two"], form="bleu")
    with pytest.raises(DataError, match="no sentence has 3 tokens"):
        distinct_n(["a b"], 3)
    with pytest.raises(DataError, match="same clusters"):
        mauve_from_histograms([1, 1], [1, 1, 1])
    with pytest.raises(DataError, match="histogram q"):
        mauve_from_histograms([1, 1], [1, -1])
    with pytest.raises(DataError, match="one width"):
        frechet_distance(np.eye(3), np.eye(4))
    with pytest.raises(LatentError, match="too few rows"):
        frechet_distance(np.eye(1), np.eye(1))
    assert math.isfinite(distinct_n(["a b", "c"], 2, form="sentences"))
    assert distinct_n(["a b", "c"], 2, form="sentences").left_out == {"sentences": {1: "shorter than 2 tokens"}}
