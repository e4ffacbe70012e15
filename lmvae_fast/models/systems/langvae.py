"""LangVAE (arXiv 2505.00004) and its release 0.6.13.

With the masked loss its paper means and teacher forcing, unless the configuration asks for objective="langvae-0.6" or
free_running=True.
"""

from __future__ import annotations

from typing import Any

PRESET: dict[str, Any] = {
    "visibility": "rolling",
    "pooling": "mean",
    "normalize": False,
    "projector": "linear",
    "projector_dropout": 0.1,
    "embedding_shift": False,
    "kl_mode": "sample_threshold",
    "kl_target": 2.0,
    "objective": "elbo",
    "length_normalize": False,
    "free_running": False,
    "train_encoder": False,
    "train_decoder": False,
    "add_prefix_space": True,
}
