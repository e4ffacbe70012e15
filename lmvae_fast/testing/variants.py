"""Tiny decoders with every kind of rotary scaling and window that a configuration may ask for, past every limit it names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lmvae_fast.kernels.latent_attention.visibility import VISIBILITIES
from lmvae_fast.testing.family_check import check_decoder, wrong
from lmvae_fast.testing.mapped_types import POSITIONS, WINDOW, tiny_config, tiny_model

ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
SHORT, LONG = 8, 22  # original lengths: one that every sentence of the check reaches past, one that none does
# Whether their layers can do without a window, and with one.
_WINDOWS = {
    "llama": (False,),
    "mistral": (False, True),
    "phi3": (False, True),
    "qwen2": (False, True),
    "qwen3": (False, True),
    "gemma2": (True,),
    "gemma3_text": (True,),
}


def variants() -> Iterator[str]:
    """Names ``type:rope`` and ``type:rope:window``."""
    for model_type, windows in _WINDOWS.items():
        for rope in ROPES:
            if model_type != "phi3" or rope in ("default", "longrope"):  # it knows no other
                yield from (f"{model_type}:{rope}" + (":window" if window else "") for window in windows)


def variant_model(name: str, *, original: int) -> PreTrainedModel:
    """The tiny model of a variant; ``original``: the length that its rotation was trained for."""
    model_type, rope, *window = name.split(":")
    config = tiny_config(model_type)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scaled = _rope(rope, original, head_dim // 2)
    fields: dict[str, Any] = config.to_dict()
    fields["max_position_embeddings"] = original if rope == "dynamic" else POSITIONS
    if model_type == "gemma3_text":  # its sliding layers keep a rotation of their own
        fields["rope_parameters"] = {"full_attention": scaled, "sliding_attention": _rope("default", original, 0)}
    else:
        fields["rope_parameters"] = scaled
    if "original_max_position_embeddings" in fields:
        fields["original_max_position_embeddings"] = original
    fields["sliding_window"] = WINDOW if window else None
    if "use_sliding_window" in fields:
        fields["use_sliding_window"] = bool(window)
        fields.pop("layer_types", None)
    return tiny_model(model_type, config=CONFIG_MAPPING[model_type](**fields))


def check_variant(name: str) -> dict[str, Any]:
    """What became of a variant: ``status`` right (past its original length, too), refused (past it, by name) or wrong; the
    figures of both lengths as `check_decoder` gives them, and the reason.

    Raises UnsupportedDecoderError for one that is refused altogether.
    """
    within = check_decoder(variant_model(name, original=LONG))
    past = check_decoder(variant_model(name, original=SHORT))
    off = wrong(within) + [f"{part} past the original length" for part in wrong(past)]
    off += [f"{part} is refused" for part in ("no_memory", "prefix") if isinstance(within[part], str)]
    refused = all(isinstance(past[part], str) for part in ("no_memory", *VISIBILITIES))
    status = "wrong" if off else "refused" if refused else "right"
    reason = ", ".join(off) or (str(past["prefix"]).removeprefix("refused: ") if refused else "")
    return {"status": status, "reason": reason, "within": within, "past": past}


def _rope(kind: str, original: int, pairs: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0}
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        fields["factor"] = POSITIONS / original if kind == "yarn" else 3.0
    if kind in ("yarn", "longrope", "llama3"):
        fields["original_max_position_embeddings"] = original
    if kind == "llama3":
        fields |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        fields |= {
            "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
            "long_factor": [2.0 + 0.5 * pair for pair in range(pairs)],
        }
    return fields
