"""Encoder and decoder folders that transformers 4.48, the only version LangVAE 0.6.13 runs on, can read.

A folder saved by transformers 5 is not: its tokenizer class has no counterpart there (an error), its rotary base sits
under a name that version 4 does not look at (no error: the default is used, and every figure is wrong), and so does its
dtype.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lmvae_fast.documents import read_object
from lmvae_fast.errors import CheckpointError

# What version 4 called the rotary base and the rotated share of a head, where not by the common names.
_ROTARY_NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}
_COMMON_NAMES = ("rope_theta", "partial_rotary_factor")


def needs_legacy_copy(folder: Path) -> bool:
    """True if transformers 4.48 would fail on this model folder or misread it."""
    config, tokenizer = _read(folder / "config.json"), _read(folder / "tokenizer_config.json")
    return "rope_parameters" in config or "dtype" in config or tokenizer.get("tokenizer_class") == "TokenizersBackend"


def write_legacy_copy(source: Path, target: Path) -> None:
    """A copy of a model folder that transformers 4.48 reads as transformers 5 reads the original.

    Raises CheckpointError for what version 4 cannot say.
    """
    target.mkdir(parents=True)
    for file in source.iterdir():
        if not file.is_file() or file.name.startswith("."):
            continue
        if file.name == "config.json":
            _write(target / file.name, legacy_config(_read(file)))
        elif file.name == "tokenizer_config.json":
            _write(target / file.name, _legacy_tokenizer(_read(file)))
        else:
            # Not a hard link: safetensors overwrites files in place, which would change both.
            shutil.copyfile(file, target / file.name)


def legacy_config(config: dict[str, Any]) -> dict[str, Any]:
    """A model's configuration in the terms of transformers 4.48."""
    config = dict(config)
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    rotary = config.pop("rope_parameters", None)
    if rotary is None:
        return config
    if any(isinstance(value, dict) for value in rotary.values()):
        raise CheckpointError(
            "transformers 4.48, which LangVAE needs, has no rotary parameters per kind of layer",
            value=config.get("model_type"),
            remedy="save the model with model.save_pretrained instead",
        )
    rotary = dict(rotary)
    base, share = _ROTARY_NAMES.get(config.get("model_type", ""), _COMMON_NAMES)
    for ours, theirs in (("rope_theta", base), ("partial_rotary_factor", share)):
        if ours in rotary:
            config[theirs] = rotary.pop(ours)
    config["rope_scaling"] = None if rotary.get("rope_type", "default") == "default" else rotary
    return config


def _legacy_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("tokenizer_class") == "TokenizersBackend":
        return {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    return config


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, error=CheckpointError) if path.is_file() else {}


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
