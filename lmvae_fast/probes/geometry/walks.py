"""Ways through latent space as arrays: lines, quantile walks along single dimensions, sums. Nothing here decodes.

The operations that decode are ``lmvae_fast.interpolate``, ``traverse`` and ``arithmetic``.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from lmvae_fast.errors import LatentError
from lmvae_fast.probes import checks
from lmvae_fast.probes.results import Array


def line(start: Any, end: Any, points: int = 11) -> Array:
    """``[points, N, D]``: evenly spaced points on the lines between ``start [N, D]`` and ``end [N, D]``, ends included."""
    checks.whole("points", points, 2)
    start, end = _pair(start, end)
    weights = (np.arange(points) / (points - 1))[:, None, None]
    return start * (1.0 - weights) + end * weights


def quantile_walk(
    z: Any, mean: Any, std: Any, *, dims: Sequence[int] | None = None, points: int = 7, tail: float = 0.001
) -> tuple[Array, Array]:
    """Move single dimensions of latents over the normal quantiles of their posteriors.

    Args:
        z: latents ``[N, D]`` that are moved.
        mean, std: of the normal distribution of each dimension, ``[N, D]`` (or broadcast to it); ``std = exp(logvar / 2)``.
        dims: dimensions, each moved alone; None for all.
        points: quantiles at evenly spaced probabilities of ``[tail, 1 - tail]``.
        tail: in (0, 0.5).

    Returns:
        Latents ``[dims, N, points, D]`` and their Euclidean distances to z, ``[dims, N, points]``.
    """
    z = checks.latents(z)
    checks.whole("points", points, 1)
    if not 0.0 < tail < 0.5:
        raise LatentError("a tail is left out at either end", value=f"tail={tail}", limit="within (0, 0.5)")
    mean, std = (
        np.broadcast_to(checks.latents(np.atleast_2d(x), name=name), z.shape)
        for x, name in ((mean, "mean"), (std, "std"))
    )
    if (std < 0.0).any():
        raise LatentError("a standard deviation is negative", value=float(std.min()), remedy="give exp(logvar / 2)")
    chosen = list(range(z.shape[1])) if dims is None else list(dims)
    wrong = [dim for dim in chosen if not 0 <= dim < z.shape[1]]
    if wrong or not chosen:
        raise LatentError("no such latent dimension", value=wrong, limit=f"0 to {z.shape[1] - 1}")
    probabilities = np.linspace(tail, 1.0 - tail, points) if points > 1 else np.array([0.5])
    quantiles = np.array([NormalDist().inv_cdf(p) for p in probabilities])
    moved = np.broadcast_to(z[:, None, :], (len(chosen), len(z), points, z.shape[1])).copy()
    for place, dim in enumerate(chosen):
        moved[place, :, :, dim] = mean[:, dim, None] + std[:, dim, None] * quantiles
    return moved, np.linalg.norm(moved - z[None, :, None, :], axis=-1)


def arithmetic(a: Any, b: Any) -> dict[str, Array]:
    """``sum``, ``difference`` (a - b) and ``mean`` of latents ``[N, D]``."""
    a, b = _pair(a, b)
    return {"sum": a + b, "difference": a - b, "mean": (a + b) / 2.0}


def _pair(a: Any, b: Any) -> tuple[Array, Array]:
    a, b = checks.latents(a, name="first"), checks.latents(b, name="second")
    if a.shape != b.shape:
        raise LatentError("both ends must have one shape", value=f"{list(a.shape)} and {list(b.shape)}")
    return a, b
