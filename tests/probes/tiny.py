"""A tiny model and settings under which all probes of it take seconds."""

from __future__ import annotations

from typing import Any

from lmvae_fast.testing import make_model

SETTINGS: dict[str, Any] = {
    "decoded": 12,
    "paths": 4,
    "points": 4,
    "resamples": 12,
    "map_rows": 60,
    "trees": 2,
    "maps": ("pca",),
    "traversed": 2,
    "steps": 3,
    "min_rows": 8,
}


def tiny_model(seed: int = 0):
    """An untrained LMVAE whose posterior means follow its encoder's vectors."""
    return make_model("gpt2", latent_dim=6, max_len=24, seed=seed)
