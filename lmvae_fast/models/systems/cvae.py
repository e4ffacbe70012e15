"""CVAE with G-Skip (IEEE TAI 7(2), 791-805, 2026; behaviour of zhangjf-nlp/LLM-based-CVAE), and the baselines of its table.

A decoder that was fine-tuned on prompts with responses is steered by P slots per layer; its first layers, copied, read prompt
and response. "Ours" of the paper is the density gap (DG-KL) with G-Skip, stage 2: the default here.
"""

from __future__ import annotations

from typing import Any

from lmvae_fast.errors import ConfigError

PRESET: dict[str, Any] = {
    "visibility": "prefix",
    "slots": 4,
    "pooling": "last",  # of a pretrained encoder, which there is none
    "normalize": False,
    "encoder_kind": "decoder_layers",
    "projector": "adapter",
    "projector_dropout": 0.0,
    "embedding_shift": False,
    "shift_kind": "mlp",
    "output_residual": "gskip",
    "kl_mode": "density_gap",
    "kl_target": 0.5,  # of free bits
    "objective": "elbo",
    "length_normalize": False,
    "free_running": False,
    "train_encoder": True,
    "stage": 2,
    "add_prefix_space": False,
}

#: Penalty by the public code's name -> fields of the model's configuration, and of the training's.
_CONSTANT: dict[str, Any] = {"beta_schedule": "constant"}
# What the published annealing meant, by its own numbers: ten cycles, 0 for half of each, up over a quarter, 1 for the rest.
_CYCLES: dict[str, Any] = {
    "beta_schedule": "cyclical", "beta": 1.0, "beta_cycles": 10, "beta_zero": 0.5, "beta_increase": 0.25
}  # fmt: skip
PENALTIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Vanilla": ({"kl_mode": "sum"}, {**_CONSTANT, "beta": 1.0}),
    "AE": ({"kl_mode": "sum"}, {**_CONSTANT, "beta": 0.0}),
    "Beta-VAE": ({"kl_mode": "sum"}, {**_CONSTANT, "beta": 0.1}),
    "Beta01-VAE": ({"kl_mode": "sum"}, {**_CONSTANT, "beta": 0.1}),
    "Beta02-VAE": ({"kl_mode": "sum"}, {**_CONSTANT, "beta": 0.2}),
    "Beta05-VAE": ({"kl_mode": "sum"}, {**_CONSTANT, "beta": 0.5}),
    "FB-VAE": ({"kl_mode": "free_bits", "kl_target": 0.5}, {**_CONSTANT, "beta": 1.0}),
    "Anneal": ({"kl_mode": "sum"}, {**_CYCLES, "beta_zero": 0.0, "beta_increase": 0.5}),
    "Anneal2": ({"kl_mode": "sum"}, _CYCLES),
    "Anneal_": ({"kl_mode": "sum"}, _CYCLES),
    "Optimus": ({"kl_mode": "free_bits", "kl_target": 0.5}, _CYCLES),
    "Optimus_": ({"kl_mode": "free_bits", "kl_target": 0.5}, _CYCLES),
    "DG-VAE": ({"kl_mode": "density_gap"}, {**_CONSTANT, "beta": 1.0}),
    "EMB-VAE": ({"kl_mode": "sum", "embedding_shift": True}, {**_CONSTANT, "beta": 1.0}),
    "EMB-DG-VAE": ({"kl_mode": "density_gap", "embedding_shift": True}, {**_CONSTANT, "beta": 1.0}),
    "BOW-VAE": ({"kl_mode": "sum", "bag_of_words": True}, {**_CONSTANT, "beta": 1.0}),
}


#: What `lmvae-fast train --system cvae` takes where nothing else is said: fields of LMVAEConfig, and of TrainConfig: 16
#: responses of a prompt at a time and 256 in a step, each of them once, nothing clipped or annealed.
RECIPE: tuple[dict[str, Any], dict[str, Any]] = (
    {"latent_dim": 32},
    {
        "epochs": 1, "batch_size": 16, "accumulation": 16, "learning_rate": 1e-5, "weight_decay": 0.0, "grad_clip": None,
        **_CONSTANT, "beta": 1.0,
    },
)  # fmt: skip


def objective_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of LMVAEConfig and of TrainConfig that make the penalty which the public code calls ``name``.

    The published comparison crosses ``Vanilla`` and ``DG-VAE`` with ``output_residual`` ``none``, ``skip`` and ``gskip``; all
    others have ``none``. Raises ConfigError for an unknown name.
    """
    if name not in PENALTIES:
        raise ConfigError("unknown penalty", value=name, limit=", ".join(PENALTIES))
    model, training = PENALTIES[name]
    return dict(model), dict(training)
