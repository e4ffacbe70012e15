"""Our own system: what of the published ones learns most in a given time on a pretrained decoder; docs/systems/lmvae.md.

LangVAE's interleaved memory, which starts as the decoder's start token; low-rank adapters of the
decoder beside it; a frozen encoder whose lower layer is read, which says more of the words; a posterior that tells sentences
apart from the first step.
"""

from __future__ import annotations

from typing import Any

PRESET: dict[str, Any] = {
    "visibility": "interleaved",
    "pooling": "mean",
    "encoder_layer": 2,
    "normalize": False,
    "projector": "linear",
    "projector_dropout": 0.0,
    "memory_init": "sink",
    "posterior_init": "whitened",
    "embedding_shift": False,
    "kl_mode": "sum",
    "kl_target": 0.0,
    "objective": "elbo",
    "length_normalize": False,
    "free_running": False,
    "train_encoder": False,
    "train_decoder": True,
    "decoder_part": "lora",
    "add_prefix_space": True,
}

#: What `lmvae-fast train --system lmvae` takes where nothing else is said: fields of LMVAEConfig, and of TrainConfig.
RECIPE: tuple[dict[str, Any], dict[str, Any]] = (
    {"latent_dim": 256, "lora_rank": 16, "lora_alpha": 32.0},
    {
        "batch_size": 32,
        "learning_rate": 1e-3,
        "schedule": "linear",
        "warmup_steps": 20,
        "beta_schedule": "linear",
        "beta": 0.02,
        "beta_zero": 0.1,
        "beta_increase": 0.6,
        "precision": "bf16",
    },
)
