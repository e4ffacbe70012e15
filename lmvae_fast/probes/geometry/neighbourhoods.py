"""Who is near whom in latent space, and what a flow and its inverse lose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmvae_fast.errors import DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.optional import require
from lmvae_fast.probes.results import Array, Score


def neighbours(z: Any, k: int = 5, *, metric: str = "euclidean") -> Array:
    """int64 ``[N, k]``: each row's nearest other rows, nearest first."""
    z = checks.latents(z, min_rows=2)
    k = checks.whole("k", k, 1, len(z) - 1)
    finder = require("sklearn.neighbors", "neighbourhoods").NearestNeighbors(n_neighbors=k, metric=metric).fit(z)
    return finder.kneighbors(return_distance=False)


def neighbour_agreement(z: Any, labels: Any, k: int = 5, *, metric: str = "euclidean") -> Score:
    """Mean share of a row's k nearest other rows that bear its label; chance is the sum of squared label shares."""
    near = neighbours(z, k, metric=metric)
    labels = checks.labels(labels, len(near))
    share = (labels[near] == labels[:, None]).mean(axis=1)
    values, counts = np.unique(labels, return_counts=True)
    return Score(
        float(share.mean()),
        choices={"k": k, "metric": metric, "chance": float(np.square(counts / len(labels)).sum())},
        details={"per_label": {value: float(share[labels == value].mean()) for value in values.tolist()}},
    )


def neighbour_overlap(a: Any, b: Any, k: int = 10, *, metric: str = "euclidean") -> Score:
    """Mean share of a row's k nearest rows in one space that are also among its k nearest in the other. 0 to 1.

    Args:
        a, b: two representations of the same N rows, ``[N, D]``, ``[N, E]``: posterior means and the encoder's vectors, say.
        k: neighbours. metric: of both.
    """
    first, second = neighbours(a, k, metric=metric), neighbours(b, k, metric=metric)
    if len(first) != len(second):
        raise DataError("both spaces must hold the same rows", value=f"{len(first)} and {len(second)}")
    shared = (first[:, :, None] == second[:, None, :]).any(axis=2).mean(axis=1)
    return Score(float(shared.mean()), choices={"k": k, "metric": metric, "chance": k / (len(first) - 1)},
                 details={"per_row": shared})  # fmt: skip


def inversion_error(forward: Callable[[Any], Any], inverse: Callable[[Any], Any], x: Any) -> Score:
    """How far x comes back from a flow and its inverse: the largest |inverse(forward(x)) - x| over the spread of x.

    Args:
        forward, inverse: maps of ``[N, D]``; a returned pair (y, logdet) counts for its first part.
        x: points ``[N, D]``, tensor or array, handed over as it is.

    Returns:
        The largest absolute error divided by the standard deviation of all of x; ``details["mean"]`` is the mean one.
    """
    there = forward(x)
    back = inverse(there[0] if isinstance(there, tuple) else there)
    before = checks.latents(x, name="x")
    after = checks.latents(back[0] if isinstance(back, tuple) else back, name="inverse(forward(x))")
    if before.shape != after.shape:
        raise DataError("a flow keeps shapes", value=f"{list(after.shape)}", limit=list(before.shape))
    error, scale = np.abs(after - before), before.std() or 1.0
    return Score(float(error.max() / scale), choices={"unit": "standard deviations of x"},
                 details={"mean": float(error.mean() / scale)})  # fmt: skip


def invertibility_ratio(before: Sequence[Any], after: Sequence[Any]) -> Score:
    """Share of points whose decoded text (or role content) is the same after a flow and its inverse. 0 to 1.

    Args:
        before, after: for each point what is compared: decoded sentences, or the word that fills a role in them.

    Source: Zhang et al. 2023 (LlaMaVAE, arXiv 2312.13208): 100 vectors through T and T^-1, role and content kept.
    """
    if len(before) != len(after) or not len(before) or isinstance(before, str):
        raise DataError("before and after must be equally many, at least one", value=f"{len(before)} and {len(after)}")
    same = [first == second for first, second in zip(before, after, strict=True)]
    return Score(float(np.mean(same)), choices={"points": len(same)}, details={"same": same})
