"""Optimus (arXiv 2004.04092): one slot per layer whose vector is both key and value, and a shift of every token embedding."""

from __future__ import annotations

from typing import Any

PRESET: dict[str, Any] = {
    "visibility": "prefix",
    "slots": 1,
    "pooling": "pooler",
    "normalize": False,
    "projector": "shared",
    "projector_dropout": 0.0,
    "embedding_shift": True,
    "kl_mode": "dim_threshold",
    "kl_target": 0.5,
    "objective": "elbo",
    "length_normalize": False,
    "free_running": False,
    "train_encoder": True,
    "train_decoder": True,
    "add_prefix_space": True,
}
