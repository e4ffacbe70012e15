"""Optimal transport between clouds of points, and the word mover's distance of sentences made of it.

Source: Kusner et al. 2015, From Word Embeddings To Document Distances. The solver is that of POT (exact network simplex).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from lmvae_fast.errors import DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.geometry.word_bags import KnownWords
from lmvae_fast.probes.optional import require
from lmvae_fast.probes.results import Array

METHODS = ("exact", "relaxed", "sinkhorn")
COSTS = ("euclidean", "sqeuclidean")


def transport_cost(
    a: Any,
    b: Any,
    weights_a: Any = None,
    weights_b: Any = None,
    *,
    cost: str = "euclidean",
    method: str = "exact",
    regularisation: float = 0.1,
) -> float:
    """min <T, M> over the transports T of one cloud's mass to the other's, M the distances of their points.

    Args:
        a, b: points ``[m, D]``, ``[n, D]``.
        weights_a, weights_b: mass of each point, not negative, of a sum above 0 (brought to 1); None for equal ones.
        cost: of moving a unit of mass: the Euclidean distance or its square.
        method: ``"exact"``; ``"relaxed"``, the lower bound that sends each point to its nearest (the larger of both
            directions); ``"sinkhorn"``, the cost of the entropically regularised plan, never below the exact one.
        regularisation: of ``"sinkhorn"``, in units of the mean distance.

    Raises:
        LatentError: a cloud is empty or not finite. DataError: weights or widths that do not fit.
    """
    checks.one_of("cost", cost, COSTS)
    checks.one_of("method", method, METHODS)
    a, b = checks.latents(a, name="a"), checks.latents(b, name="b")
    if a.shape[1] != b.shape[1]:
        raise DataError("both clouds must have one width", value=f"{a.shape[1]} and {b.shape[1]}")
    mass_a, mass_b = _mass(weights_a, len(a), "weights_a"), _mass(weights_b, len(b), "weights_b")
    return _transport(_distances(a, b, cost), mass_a, mass_b, method, regularisation)


def word_movers_distance(
    a: str | Sequence[str],
    b: str | Sequence[str],
    vectors: Any,
    *,
    unit: bool = False,
    stop_words: Collection[str] = (),
    method: str = "exact",
) -> float:
    """Word mover's distance of two sentences: the least way that the words of one travel to become the other's.

    Each word has the mass of its frequency; the cost is the Euclidean distance of word vectors. Not negative, a metric, in
    the unit of the vectors (at most 2 for unit vectors).

    Args:
        a, b: sentences, or lists of words. Sentences are lower-cased and split at white space; a word without a vector is
            tried without the punctuation around it, then dropped.
        vectors: a mapping word -> vector, or a source of them: ``lmvae_fast.read_word_vectors("glove")``, say.
        unit: scale vectors to length one first, as is done with word2vec's.
        stop_words: words to leave out.
        method: see :func:`transport_cost`.

    Returns:
        Infinity when a sentence has no known word; exactly 0 for equal bags of words.
    """
    checks.one_of("method", method, METHODS)
    known = KnownWords(vectors, unit=unit)
    bags = [known.bag(text, stop_words) for text in (a, b)]
    return word_movers_of_bags(bags[0], bags[1], known, method)


def word_movers_of_bags(first: Counter[int], second: Counter[int], known: KnownWords, method: str = "exact") -> float:
    """Word mover's distance of bags that ``known`` made; infinity when one is empty."""
    if not first or not second:
        return float("inf")
    if first == second:
        return 0.0
    (points, mass), (others, other_mass) = known.points(first), known.points(second)
    return _transport(_distances(points, others, "euclidean"), mass, other_mass, method, 0.1)


def _transport(costs: Array, mass_a: Array, mass_b: Array, method: str, regularisation: float) -> float:
    if method == "relaxed":
        return float(max(costs.min(axis=1) @ mass_a, costs.min(axis=0) @ mass_b))
    solver = require("ot", "optimal transport")
    if method == "exact":
        return float(solver.emd2(mass_a, mass_b, costs))
    return float(solver.sinkhorn2(mass_a, mass_b, costs, reg=regularisation * costs.mean()))


def _distances(a: Array, b: Array, cost: str) -> Array:
    """``[m, n]``, from differences: equal points have exactly 0, which an expanded square would not give."""
    squares = ((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=-1)
    return squares if cost == "sqeuclidean" else np.sqrt(squares)


def _mass(weights: Any, count: int, name: str) -> Array:
    if weights is None:
        return np.full(count, 1.0 / count)
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (count,) or not np.all(weights >= 0.0) or not 0.0 < weights.sum() < np.inf:
        raise DataError(f"{name} must be {count} numbers >= 0 of a sum above 0", value=list(weights.shape))
    return weights / weights.sum()
