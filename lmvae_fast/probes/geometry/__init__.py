"""Geometry of a latent space: ways through it, how smooth they read, who is near whom."""

from lmvae_fast.probes.geometry.neighbourhoods import (
    inversion_error,
    invertibility_ratio,
    neighbour_agreement,
    neighbour_overlap,
    neighbours,
)
from lmvae_fast.probes.geometry.smoothness import interpolation_smoothness
from lmvae_fast.probes.geometry.transport import transport_cost, word_movers_distance
from lmvae_fast.probes.geometry.walks import arithmetic, line, quantile_walk
from lmvae_fast.probes.geometry.word_bags import KnownWords

__all__ = [
    "KnownWords",
    "arithmetic",
    "interpolation_smoothness",
    "inversion_error",
    "invertibility_ratio",
    "line",
    "neighbour_agreement",
    "neighbour_overlap",
    "neighbours",
    "quantile_walk",
    "transport_cost",
    "word_movers_distance",
]
