"""How far two sets of texts are apart as distributions: Frechet distance of their embeddings, MAUVE.

Sources: Heusel et al. 2017 (arXiv 1706.08500), the distance of two normal distributions; Pillutla et al. 2021 (MAUVE,
arXiv 2102.01454), section 3.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lmvae_fast.errors import DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.optional import require
from lmvae_fast.probes.results import Array, Score


def frechet_distance(a: Any, b: Any) -> Score:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two sets of embeddings. 0 for equal sets.

    Args:
        a, b: embeddings ``[N >= 2, D]``, ``[M >= 2, D]``. The distance of two samples of one distribution is above 0 and
            falls with N and M: compare sets of one size, much larger than D.
    """
    a, b = checks.latents(a, name="a", min_rows=2), checks.latents(b, name="b", min_rows=2)
    if a.shape[1] != b.shape[1]:
        raise DataError("both sets must have one width", value=f"{a.shape[1]} and {b.shape[1]}")
    means = a.mean(axis=0) - b.mean(axis=0)
    first, second = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    # tr (S_a S_b)^(1/2) is the sum of the roots of the eigenvalues of the symmetric S_a^(1/2) S_b S_a^(1/2).
    root = _root(first)
    crossed = np.linalg.eigvalsh(root @ second @ root)
    overlap = np.sqrt(np.maximum(crossed, 0.0)).sum()
    value = float(means @ means + np.trace(first) + np.trace(second) - 2.0 * overlap)
    return Score(max(value, 0.0), choices={"rows": (len(a), len(b)), "dimensions": a.shape[1]},
                 details={"means": float(means @ means)})  # fmt: skip


def mauve_from_histograms(p: Any, q: Any, *, mixtures: int = 25, scaling: float = 5.0) -> Score:
    """MAUVE of two histograms over the same clusters: the area under their divergence curve. 0 (apart) to 1 (equal).

    For mixtures R = w P + (1 - w) Q the curve has the points (exp(-c KL(Q|R)), exp(-c KL(P|R))).

    Args:
        p, q: counts or shares ``[B]``, not negative, of a sum above 0.
        mixtures: weights w, evenly spaced within (0, 1). scaling: c.

    Returns:
        ``details["curve"]``: ``[mixtures + 2, 2]``.
    """
    checks.whole("mixtures", mixtures, 1)
    p, q = _histogram(p, "p"), _histogram(q, "q")
    if p.shape != q.shape:
        raise DataError("both histograms must have the same clusters", value=f"{len(p)} and {len(q)}")
    weights = np.linspace(1e-6, 1.0 - 1e-6, mixtures)[:, None]
    mixed = weights * p + (1.0 - weights) * q
    curve = np.exp(-scaling * np.stack([_divergence(q, mixed), _divergence(p, mixed)], axis=1))
    curve = np.concatenate([[[1.0, 0.0]], curve, [[0.0, 1.0]]])
    value = 0.5 * (_area(curve[:, 0], curve[:, 1]) + _area(curve[:, 1], curve[:, 0]))
    return Score(
        value, choices={"clusters": len(p), "mixtures": mixtures, "scaling": scaling}, details={"curve": curve}
    )


def mauve(
    a: Any, b: Any, *, clusters: int | None = None, seeds: tuple[int, ...] = (0, 1, 2), scaling: float = 5.0,
    package: str = "scikit-learn",
) -> Score:  # fmt: skip
    """MAUVE of two sets of embeddings: the mean over seeds of the k-means that makes the histograms, with its spread.

    Args:
        a, b: embeddings ``[N, D]``, ``[M, D]``.
        clusters: of the k-means; None for a tenth of the smaller set, at least 2.
        seeds: of the k-means, which the figure depends on: quote them.
        scaling: see :func:`mauve_from_histograms`.
        package: ``"mauve-text"``, the authors' own package (extra ``mauve``; GPL), whose k-means is faiss's; or
            ``"scikit-learn"``: the same steps with its k-means. Figures of one are not compared with those of the other.

    Rows are scaled to length one and projected on the principal components that explain 90 % of their variance.
    """
    checks.one_of("package", package, ("scikit-learn", "mauve-text"))
    a, b = checks.latents(a, name="a", min_rows=4), checks.latents(b, name="b", min_rows=4)
    if a.shape[1] != b.shape[1] or not seeds:
        raise DataError("both sets must have one width, and a seed", value=f"{a.shape[1]}, {b.shape[1]}, seeds {seeds}")
    count = (
        max(2, min(len(a), len(b)) // 10)
        if clusters is None
        else checks.whole("clusters", clusters, 2, len(a) + len(b))
    )
    cluster = _by_mauve_text if package == "mauve-text" else _by_scikit_learn
    found = [mauve_from_histograms(*parts, scaling=scaling).value for parts in cluster(a, b, count, seeds)]
    return Score(
        float(np.mean(found)),
        choices={
            "clusters": count,
            "seeds": list(seeds),
            "scaling": scaling,
            "rows": (len(a), len(b)),
            "package": package,
        },
        seed=seeds[0],
        spread=float(np.std(found, ddof=1)) if len(found) > 1 else None,
        details={"per_seed": found},
    )


def _by_scikit_learn(a: Array, b: Array, clusters: int, seeds: tuple[int, ...]) -> list[tuple[Array, Array]]:
    """For each seed the histograms of both sets over the clusters of all."""
    decomposition = require("sklearn.decomposition", "MAUVE", "metrics")
    clustering = require("sklearn.cluster", "MAUVE", "metrics")
    both = np.concatenate([a, b])
    lengths = np.linalg.norm(both, axis=1, keepdims=True)
    both = decomposition.PCA(n_components=0.9, svd_solver="full").fit_transform(
        both / np.where(lengths > 0.0, lengths, 1.0)
    )
    found = []
    for seed in seeds:
        chosen = clustering.KMeans(n_clusters=clusters, n_init=5, random_state=seed).fit_predict(both)
        parts = (chosen[: len(a)], chosen[len(a) :])
        found.append((np.bincount(parts[0], minlength=clusters), np.bincount(parts[1], minlength=clusters)))
    return found


def _by_mauve_text(a: Array, b: Array, clusters: int, seeds: tuple[int, ...]) -> list[tuple[Array, Array]]:
    """The histograms that the package makes."""
    package = require("mauve", "MAUVE by its authors' package", "mauve")
    found = (
        package.compute_mauve(p_features=a, q_features=b, num_buckets=clusters, seed=seed, verbose=False)
        for seed in seeds
    )
    return [(each.p_hist, each.q_hist) for each in found]


def _root(matrix: Array) -> Array:
    """The symmetric root of a covariance."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _histogram(value: Any, name: str) -> Array:
    value = np.asarray(value, dtype=np.float64)
    if value.ndim != 1 or not np.all(value >= 0.0) or not 0.0 < value.sum() < np.inf:
        raise DataError(f"histogram {name} must be numbers >= 0 of a sum above 0", value=list(value.shape))
    return value / value.sum()


def _divergence(p: Array, mixed: Array) -> Array:
    """KL(p | m) of each row m of ``mixed``, nats."""
    there = p > 0.0
    return (p[there] * np.log(p[there] / mixed[:, there])).sum(axis=1)


def _area(x: Array, y: Array) -> float:
    """Area under the points taken in the order of x."""
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    return float((np.diff(x) * (y[1:] + y[:-1])).sum() / 2.0)
