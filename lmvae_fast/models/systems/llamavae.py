"""LlaMaVAE (arXiv 2312.13208): sentence-T5, and a LLaMA whose token embedding and head are tuned, with the latent as memory.

What is published leaves much open; docs/systems/llamavae.md says of every value where it comes from. In short: one slot per
layer, one vector as its key and as its value, no embedding shift (the memory of Optimus, as the same group words it for
BERT-GPT-2); trained are token embedding, head, posterior head and projector; the KL of a dimension counts above 1 nat.
``projector="mlp"``, with keys and values of their own behind a hidden GELU layer, is an option of ours.
"""

from __future__ import annotations

from typing import Any

PRESET: dict[str, Any] = {
    "visibility": "prefix",
    "slots": 1,
    "pooling": "mean",
    "normalize": True,
    "projector": "shared",
    "projector_dropout": 0.0,
    "embedding_shift": False,
    "kl_mode": "dim_threshold",
    "kl_target": 1.0,
    "objective": "elbo",
    "length_normalize": False,
    "free_running": False,
    "train_encoder": False,
    "train_decoder": True,
    "decoder_part": "embeddings",
    "add_prefix_space": True,
}

#: What `lmvae-fast train --system llamavae` takes where nothing else is said: fields of LMVAEConfig, and of TrainConfig
#: (those of the same group's trainer of Optimus).
RECIPE: tuple[dict[str, Any], dict[str, Any]] = (
    {"latent_dim": 32},
    {
        "epochs": 30,
        "batch_size": 64,
        "learning_rate": 5e-5,
        "adam_eps": 1e-8,
        "weight_decay": 0.0,
        "schedule": "linear",
        "grad_clip": 1.0,
        "beta_schedule": "cyclical",
        "beta": 1.0,
        "beta_cycles": 5,
        "beta_zero": 0.25,
        "beta_increase": 0.25,
    },
)
