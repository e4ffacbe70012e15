"""How far labels lie apart in a latent space. The figures are scikit-learn's; all use every dimension of the latent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmvae_fast.errors import DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.optional import require
from lmvae_fast.probes.results import Array, Score

#: Seeds of the k-means.
SEEDS = (0, 1, 2, 3, 4)


def silhouette(x: Any, labels: Any, *, metric: str = "euclidean") -> Score:
    """Mean over rows of (b - a) / max(a, b): a the mean distance to the own class, b to the nearest other. -1 to 1.

    Args:
        x: ``[N, D]``. labels: ``[N]``, two to N - 1 different ones.
        metric: of scikit-learn; ``"euclidean"`` or ``"cosine"``.

    Returns:
        ``details["per_class"]``: the mean of each class.
    """
    x, labels, classes = _labelled(x, labels)
    rows = require("sklearn.metrics", "the silhouette").silhouette_samples(x, labels, metric=metric)
    per_class = {value: float(rows[labels == value].mean()) for value in classes.tolist()}
    return Score(
        float(rows.mean()), choices={"metric": metric, "classes": len(classes)}, details={"per_class": per_class}
    )


def calinski_harabasz(x: Any, labels: Any) -> Score:
    """Variance between classes over variance within, each by its degrees of freedom. Above 0, no upper end; 1 is chance."""
    x, labels, classes = _labelled(x, labels)
    value = require("sklearn.metrics", "the Calinski-Harabasz index").calinski_harabasz_score(x, labels)
    return Score(float(value), choices={"classes": len(classes)})


def davies_bouldin(x: Any, labels: Any) -> Score:
    """Mean over classes of the worst (spread + spread) / distance of centroids. 0 and up; lower is better apart."""
    x, labels, classes = _labelled(x, labels)
    value = require("sklearn.metrics", "the Davies-Bouldin index").davies_bouldin_score(x, labels)
    return Score(float(value), choices={"classes": len(classes)})


def centroids(x: Any, labels: Any) -> dict[str, Any]:
    """``distances`` ``[C, C]`` between the class means, ``spread`` ``[C]`` (root mean square distance to the own mean) and
    ``classes``, in sorted order."""
    x, labels, classes = _labelled(x, labels)
    means = np.stack([x[labels == value].mean(axis=0) for value in classes])
    spread = [
        np.sqrt(((x[labels == value] - mean) ** 2).sum(axis=1).mean())
        for value, mean in zip(classes, means, strict=True)
    ]
    distances = np.linalg.norm(means[:, None] - means[None], axis=-1)
    return {"classes": classes.tolist(), "distances": distances, "spread": np.array(spread)}


def kmeans_agreement(x: Any, labels: Any, *, seeds: Sequence[int] = SEEDS, restarts: int = 10) -> dict[str, Score]:
    """Does k-means, told only the number of classes, find them? ``ari``, ``nmi``, ``v``, ``homogeneity``, ``completeness``.

    ARI is 0 for chance and 1 for the classes themselves (it may be negative); the others are 0 to 1.

    Args:
        x, labels: as above.
        seeds: of the k-means, each with ``restarts`` initialisations, the best of which (by its own inertia) counts.

    Returns:
        Each score's mean over seeds, with its spread; ``details["per_seed"]`` and ``details["best"]``, that of the seed with
        the least inertia.
    """
    x, labels, classes = _labelled(x, labels)
    if not len(seeds):
        raise DataError("k-means needs a seed", value=tuple(seeds))
    metrics = require("sklearn.metrics", "the agreement of k-means")
    clustering = require("sklearn.cluster", "k-means")
    found: dict[str, list[float]] = {name: [] for name in ("ari", "nmi", "v", "homogeneity", "completeness")}
    inertia = []
    for seed in seeds:
        model = clustering.KMeans(n_clusters=len(classes), n_init=restarts, random_state=seed).fit(x)
        inertia.append(model.inertia_)
        both = metrics.homogeneity_completeness_v_measure(labels, model.labels_)
        figures = (
            metrics.adjusted_rand_score(labels, model.labels_),
            metrics.normalized_mutual_info_score(labels, model.labels_),
            both[2],
            both[0],
            both[1],
        )
        for name, value in zip(found, figures, strict=True):
            found[name].append(float(value))
    best = int(np.argmin(inertia))
    choices = {"clusters": len(classes), "seeds": list(seeds), "restarts": restarts}
    return {
        name: Score(
            float(np.mean(values)),
            choices=choices,
            seed=seeds[0],
            spread=float(np.std(values, ddof=1)) if len(values) > 1 else None,
            details={"per_seed": values, "best": values[best]},
        )
        for name, values in found.items()
    }


def knn_accuracy(x: Any, labels: Any, k: int = 5) -> Score:
    """Share of rows whose label is the most frequent among their k nearest other rows (leave one out). 0 to 1.

    Of equally frequent labels the first in sorted order wins, as in scikit-learn.
    """
    x, labels, classes = _labelled(x, labels)
    k = checks.whole("k", k, 1, len(x) - 1)
    finder = require("sklearn.neighbors", "k nearest neighbours").NearestNeighbors(n_neighbors=k).fit(x)
    near = np.searchsorted(classes, labels)[finder.kneighbors(return_distance=False)]
    votes = (near[:, :, None] == np.arange(len(classes))).sum(axis=1)
    right = classes[votes.argmax(axis=1)] == labels
    _, counts = np.unique(labels, return_counts=True)
    return Score(float(right.mean()), choices={"k": k, "chance": float(counts.max() / len(labels))})


def separation(x: Any, labels: Any, *, k: int = 5, seeds: Sequence[int] = SEEDS) -> dict[str, Score]:
    """All of the above by name: ``silhouette``, ``calinski_harabasz``, ``davies_bouldin``, ``knn`` and k-means' five."""
    return {
        "silhouette": silhouette(x, labels),
        "calinski_harabasz": calinski_harabasz(x, labels),
        "davies_bouldin": davies_bouldin(x, labels),
        "knn": knn_accuracy(x, labels, k),
        **kmeans_agreement(x, labels, seeds=seeds),
    }


def _labelled(x: Any, labels: Any) -> tuple[Array, Array, Array]:
    x = checks.latents(x, name="x", min_rows=3)
    labels = checks.labels(labels, len(x))
    classes = np.unique(labels)
    if not 2 <= len(classes) < len(x):
        raise DataError(
            "classes must be at least two and fewer than rows", value=len(classes), limit=f"2 to {len(x) - 1}",
            remedy="choose a factor with fewer values, or more sentences",
        )  # fmt: skip
    return x, labels, classes
