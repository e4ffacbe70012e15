"""A code that is the bundled corpus's generative factors themselves scores what theory says, metric by metric."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from lmvae_fast.data import generate_corpus
from lmvae_fast.probes import factors
from lmvae_fast.probes.disentanglement import (
    dci,
    explicitness,
    mig,
    modularity,
    mutual_information,
    sap,
    z_diff,
    z_min_var,
)

# The corpus's factors are not independent (a topic settles the number of many of its nouns). No value of these settles
# another of them, so a group that shares one of them shares no second one.
NAMES = ("modifier", "negation", "quantifier")


@pytest.fixture(scope="module")
def corpus():
    """Factors of 3,000 sentences of the bundled corpus."""
    return factors.generative(generate_corpus(3000), NAMES)


@pytest.fixture(scope="module")
def information(corpus):
    """I(y_j; y_k) in nats ``[K, K]``, with entropies on the diagonal."""
    columns = corpus.y.T
    return np.array([[mutual_info_score(a, b) for b in columns] for a in columns])


def test_no_value_settles_another_factor(corpus):
    for first, second in permutations(range(len(NAMES)), 2):
        for value in range(len(corpus.values[first])):
            others = np.bincount(corpus.y[corpus.y[:, first] == value, second])
            assert others.max() < 0.98 * others.sum()


def test_mutual_information_of_all_factors():
    every = factors.generative(generate_corpus(3000))
    bins = max(len(values) for values in every.values)
    assert bins > 100  # as many bins as the largest factor has values: each value has its own
    want = [[mutual_info_score(a, b) for b in every.y.T] for a in every.y.T]
    np.testing.assert_allclose(mutual_information(every.y, every.y, bins).value, want, rtol=0, atol=1e-9)


def test_mig_and_modularity(corpus, information):
    entropies, others = np.diag(information), information - np.diag(np.diag(information))
    gap = mig(corpus.y, corpus.y)
    np.testing.assert_allclose(gap.per_factor, 1.0 - others.max(axis=0) / entropies, rtol=0, atol=1e-9)
    squares = (others**2).sum(axis=1) / (len(NAMES) - 1)
    want = np.mean(1.0 - squares / entropies**2)
    assert modularity(mutual_information(corpus.y, corpus.y)).value == pytest.approx(want, abs=1e-9)


def test_independent_factors_reach_one():
    """Every combination once: I between factors is exactly zero, so MIG and modularity are exactly one."""
    grid = np.stack(np.meshgrid(np.arange(2), np.arange(3), np.arange(5), indexing="ij"), axis=-1).reshape(-1, 3)
    y = np.tile(grid, (20, 1))
    assert mig(y, y).value == pytest.approx(1.0, abs=1e-12)
    assert modularity(mutual_information(y, y)).value == pytest.approx(1.0, abs=1e-12)
    assert sap(y, y, kind="continuous", rows="all").value == pytest.approx(1.0, abs=1e-12)


def test_sap(corpus):
    correlations = np.corrcoef(corpus.y.T) ** 2 - np.eye(len(NAMES))
    score = sap(corpus.y, corpus.y, kind="continuous", rows="all")
    np.testing.assert_allclose(score.per_factor, 1.0 - correlations.max(axis=0), rtol=0, atol=1e-9)
    discrete = sap(corpus.y, corpus.y).details["scores"]
    # A threshold separates two values; with more, a linear classifier cannot pick out the middle ones.
    assert discrete[1, 1] == 1.0 and len(corpus.values[1]) == 2
    for k in (0, 2):
        assert len(corpus.values[k]) > 3 and discrete[k, k] < 1.0


def test_predictability(corpus):
    few = corpus.select(["negation", "quantifier"])
    assert explicitness(few.y, few.y).value == pytest.approx(1.0, abs=1e-9)


def test_dci(corpus):
    score = dci(corpus.y, corpus.y, trees=10)
    assert score.informativeness == 1.0
    assert score.disentanglement == pytest.approx(1.0, abs=1e-6)
    assert score.completeness == pytest.approx(1.0, abs=1e-6)


def test_groups(corpus):
    assert z_diff(corpus.y, corpus.y, repetitions=2).value == pytest.approx(1.0, abs=0.01)
    assert z_min_var(corpus.y, corpus.y, repetitions=2).value == 1.0


def test_a_mixed_code_scores_less(corpus):
    mix = np.linalg.qr(np.random.default_rng(0).normal(size=(len(NAMES), len(NAMES))))[0]
    mixed = corpus.y @ mix
    for metric in (mig, lambda z, y: sap(z, y, kind="continuous"), lambda z, y: z_min_var(z, y, repetitions=1)):
        assert metric(mixed, corpus.y) < metric(corpus.y, corpus.y) - 0.05
