"""Pictures' coordinates: two dimensions that show as much of a whole latent space as two can.

PCA keeps directions, t-SNE (van der Maaten & Hinton 2008) and UMAP (McInnes et al. 2018, arXiv 1802.03426) neighbourhoods.
All see every dimension of the latent; how far the picture can be trusted is part of the result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmvae_fast.errors import LatentError
from lmvae_fast.probes import checks
from lmvae_fast.probes.optional import require
from lmvae_fast.probes.results import Array, plain

METHODS = ("pca", "tsne", "umap")


@dataclass(frozen=True, eq=False)
class Projection:
    """Points of a picture.

    Attributes:
        points: ``[N, 2]``.
        method: of :data:`METHODS`.
        trustworthiness: 1 where the nearest points of the picture are nearest in the latent too, about 0.5 for chance.
        choices: of the method.
        seed: of the method; None where nothing is random.
        details: ``explained`` variance ratios of PCA, the ``kl`` divergence that t-SNE ended with.
    """

    points: Array
    method: str
    trustworthiness: float
    choices: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The trustworthiness."""
        return self.trustworthiness

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = ("points", "method", "trustworthiness", "choices", "seed", "details")
        return {name: plain(getattr(self, name)) for name in names}


def project(x: Any, method: str = "pca", *, seed: int = 0, neighbours: int = 5, **options: Any) -> Projection:
    """Two dimensions of ``x [N >= 4, D >= 2]`` by one of :data:`METHODS`.

    Args:
        x: latents; all their dimensions are used.
        method: see the module.
        seed: of t-SNE and UMAP.
        neighbours: k of the trustworthiness, less than N / 2.
        options: ``standardise=False`` of PCA; ``perplexity=30.0`` (at most (N - 1) / 3), ``iterations=1000``,
            ``exact=False`` of t-SNE; ``near=15``, ``min_dist=0.1`` of UMAP.

    Raises:
        LatentError: x is no finite matrix or all its rows are equal. ConfigError: an unknown method or option.
        MissingPackageError: umap-learn is absent (``"umap"``).
    """
    checks.one_of("method", method, METHODS)
    x = checks.latents(x, name="x", min_rows=4, min_dims=2)
    if np.all(x == x[0]):
        raise LatentError("all rows are equal: there is nothing to show", value=list(x.shape))
    known = {"pca": {"standardise"}, "tsne": {"perplexity", "iterations", "exact"}, "umap": {"near", "min_dist"}}[
        method
    ]
    for name in options:
        checks.one_of(f"option of {method}", name, tuple(sorted(known)))
    makers: dict[str, Callable[..., tuple[Array, dict[str, Any], dict[str, Any]]]]
    makers = {"pca": _pca, "tsne": _tsne, "umap": _umap}
    points, choices, details = makers[method](x, seed, **options)
    k = checks.whole("neighbours", min(neighbours, (len(x) - 1) // 2), 1)
    trust = require("sklearn.manifold", "trustworthiness").trustworthiness(x, points, n_neighbors=k)
    return Projection(
        points, method, float(trust), {**choices, "neighbours": k}, None if method == "pca" else seed, details
    )


def _pca(x: Array, seed: int, standardise: bool = False) -> tuple[Array, dict[str, Any], dict[str, Any]]:
    centred = x - x.mean(axis=0)
    if standardise:
        std = x.std(axis=0)
        centred = centred / np.where(std > 0.0, std, 1.0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    shares = singular**2 / (singular**2).sum()
    # The sign of a direction is free: let its largest weight be positive.
    largest = directions[np.arange(2), np.abs(directions[:2]).argmax(axis=1)]
    chosen = directions[:2] * np.sign(largest)[:, None]
    return centred @ chosen.T, {"standardise": standardise}, {"explained": shares[:2], "directions": chosen}


def _tsne(
    x: Array, seed: int, perplexity: float = 30.0, iterations: int = 1000, exact: bool = False
) -> tuple[Array, dict[str, Any], dict[str, Any]]:
    perplexity = min(perplexity, (len(x) - 1) / 3)
    model = require("sklearn.manifold", "t-SNE").TSNE(
        init="pca",
        perplexity=perplexity,
        max_iter=iterations,
        method="exact" if exact else "barnes_hut",
        random_state=seed,
    )
    points = model.fit_transform(x)
    choices = {"perplexity": perplexity, "iterations": iterations, "start": "PCA", "exact": exact}
    return points.astype(np.float64), choices, {"kl": float(model.kl_divergence_)}


def _umap(x: Array, seed: int, near: int = 15, min_dist: float = 0.1) -> tuple[Array, dict[str, Any], dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed makes it run on one thread
        library = require("umap", "UMAP", "umap")
        near = min(near, len(x) - 1)
        points = library.UMAP(n_neighbors=near, min_dist=min_dist, random_state=seed).fit_transform(x)
    return np.asarray(points, dtype=np.float64), {"near": near, "min_dist": min_dist}, {}
