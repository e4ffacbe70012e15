"""Frozen parts that are named and not stored: whether they still are what a model was trained with.

A model's folder may name its encoder and decoder instead of holding them. What is named can be replaced behind it, and the part
in memory can have become another than the named one (a decoder that an earlier stage trained): both are found here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lmvae_fast.config import DTYPES, LMVAEConfig
from lmvae_fast.documents import parse_json
from lmvae_fast.errors import CheckpointError
from lmvae_fast.files import sampled_fingerprint
from lmvae_fast.models.decoder.tuning import without_adapters
from lmvae_fast.text.tokenizer import SentenceTokenizer

logger = logging.getLogger(__name__)

#: Entries of a configuration that change nothing of what a frozen part computes, or that are compared otherwise.
_OF_NO_MATTER = {
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "name_or_path", "use_cache", "return_dict",
    "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "finetuning_task", "initializer_range",
    "initializer_factor", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "cls_token_id", "decoder_start_token_id", "forced_eos_token_id", "gradient_checkpointing", "model_type",
    "is_encoder_decoder", "tokenizer_class", "attn_implementation", "experts_implementation", "chunk_size_feed_forward",
}  # fmt: skip

#: What tokenizers are asked to read, beside a share of their own tokens.
_TEXTS = (
    "a cat is a kind of animal", "The sun is a star.", "It's 3.5 km, isn't it?", " naïve Café  №7\t", "猫 и собака 😀",
)  # fmt: skip
_TOKENS_READ = 512


# What is in memory against what was named -----------------------------------------------------------------------------


def remember(part: Any) -> None:
    """Note of a part that was loaded by a name what its weights were then; once."""
    named = getattr(part, "source", None) is not None and not hasattr(part, "as_loaded")
    if named and all(weight.device.type != "meta" for weight in part.parameters()):
        part.as_loaded = {key: _of_one(value) for key, value in _weights(part).items()}


def became_another(part: Any, names: set[str]) -> None:
    """Note that these weights of a part, by their names in it, were copied in from elsewhere."""
    if hasattr(part, "as_loaded"):
        part.as_loaded |= {name.replace(".base_layer.", "."): None for name in names}


def replaced(part: Any) -> set[str]:
    """Names of weights of a part that were copied in from elsewhere since it was loaded by its name."""
    return {key for key, value in getattr(part, "as_loaded", {}).items() if value is None}


def changed(name: str, part: Any, trained: Mapping[str, Tensor]) -> bool:
    """Whether weights of a part that are not among the trained ones are others than those of the source it names."""
    known = getattr(part, "as_loaded", None)
    if known is None:
        return False
    stored = {key.replace(".base_layer.", ".") for key in trained}
    return any(
        known.get(key) != _of_one(value) for key, value in _weights(part).items() if f"{name}.{key}" not in stored
    )


def _weights(part: Any) -> dict[str, Tensor]:
    return without_adapters(dict(part.named_parameters()))


def _of_one(weight: Tensor) -> str:
    return sampled_fingerprint({"": weight})


# What is named against what a model was trained with ------------------------------------------------------------------


def fingerprint(name: str, model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Fingerprint of what did not train of a part: its weights without those in ``state`` and without adapters."""
    weights = without_adapters(dict(model.named_parameters()))  # tied ones once
    trained = {key.replace(".base_layer.", ".") for key in state}
    return sampled_fingerprint({key: value for key, value in weights.items() if f"{name}.model.{key}" not in trained})


def record(name: str, part: Any, config: LMVAEConfig, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a folder says of a part that it names and does not hold."""
    found = {
        "dtype": config.dtype,
        "held": _dtype(part.model),
        "sha256": fingerprint(name, part.model, state),
        "config": _fields(part.model.config),
        "transformers": transformers.__version__,
        "tokenizer": _reading(part),
    }
    if (dense := _of_dense(part)) is not None and f"{name}.dense.0.weight" not in state:
        found["dense"] = dense
    return found


def check(
    saved: Mapping[str, Any],
    name: str,
    part: Any,
    config: LMVAEConfig,
    wanted: LMVAEConfig,
    state: Mapping[str, Tensor],
) -> None:
    """Look whether a part is the one that ``saved``, a record, is of; records of earlier versions say less.

    config, wanted: the model's as saved and as loaded now. state: its trained weights. Raises CheckpointError for another part,
    unless another one was asked for: then there is a warning.
    """
    problem = _difference(saved, name, part, config, wanted, state)
    if problem is None:
        return
    what, value = problem
    if getattr(config, name) != getattr(wanted, name):
        logger.warning("the %s given has %s than the one this model was trained with", name, what)
        return
    raise CheckpointError(
        f"the {name} has {what} than the one this model was trained with",
        value=f"{getattr(wanted, name)}{value}",
        limit=f"fingerprint {saved['sha256'][:16]}",
        remedy=f"restore it; or pass {name}= to take another one on purpose",
    )


def _difference(
    saved: Mapping[str, Any],
    name: str,
    part: Any,
    config: LMVAEConfig,
    wanted: LMVAEConfig,
    state: Mapping[str, Tensor],
) -> tuple[str, str] | None:
    """What is another (the end of a sentence), and where; None where nothing is."""
    other = saved.get("transformers") != transformers.__version__
    fields = _unequal(saved.get("config", {}), _fields(part.model.config), unset_matters=not other)
    if fields:
        return "another configuration", f": {', '.join(fields[:3])}"
    # These two change how a decoder's tokenizer reads, and may be changed on purpose.
    read_alike = all(getattr(config, field) == getattr(wanted, field) for field in ("add_prefix_space", "start_token"))
    if "tokenizer" in saved and (name != "decoder" or read_alike) and saved["tokenizer"] != _reading(part):
        return "another tokenizer", ""
    if "dense" in saved and config.pooling == wanted.pooling and saved["dense"] != _of_dense(part):
        return "other dense layers", ""  # which another pooling may do without
    if "tokenizer" not in saved and _of_dense(part) is not None and not Path(part.source or ".").exists():
        return "other dense layers", ", of which earlier versions read none by a hub name"
    if fingerprint(name, part.model, state) == saved["sha256"]:
        return None
    held = saved.get("held") or _held(name, config)
    if held in DTYPES and held != _dtype(part.model):
        # Other roundings of the same weights have another fingerprint: they are read again as they were held.
        again = fingerprint(name, _again(name, part, getattr(torch, str(held))).model, state)
        return None if again == saved["sha256"] else ("other weights", "")
    return "other weights", ""


def _dtype(model: nn.Module) -> str:
    """The name of the dtype that a model's first weight is held in."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _of_dense(part: Any) -> str | None:
    dense = getattr(part, "dense", None)
    return None if dense is None else sampled_fingerprint(dict(dense.named_parameters()))


def _held(name: str, config: LMVAEConfig) -> str:
    """The dtype that a part was held in, by a configuration: what trains in part is float32 at least."""
    half = config.dtype in ("float16", "bfloat16")
    return "float32" if half and getattr(config, f"train_{name}") else config.dtype


def _again(name: str, part: Any, dtype: torch.dtype) -> Any:
    if name == "decoder":
        return type(part).load(part.source, dtype=dtype, add_prefix_space=False)
    options = {"pooling": part.pooling, "normalize": part.normalize, "segments": part.segments, "layer": part.layer}
    return type(part).load(part.source, dtype=dtype, **options)


def _fields(config: Any) -> dict[str, Any]:
    """What a configuration says of how a model computes, as JSON has it."""
    return _plain(parse_json(json.dumps(config.to_dict(), default=str), "the configuration", error=CheckpointError))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    kept = {
        key: value
        for key, value in values.items()
        # a frozen part has no dropout
        if key not in _OF_NO_MATTER and not key.startswith(("_", "output_")) and "drop" not in key
    }
    return {key: _plain(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _unequal(saved: Any, now: Mapping[str, Any], place: str = "", *, unset_matters: bool) -> list[str]:
    """Fields that both have and that differ: versions of transformers have different ones, and other values for those that
    nobody set (``unset_matters``: whether such count)."""
    found = []
    for key in sorted(saved.keys() & now.keys()) if isinstance(saved, dict) else ():
        before, after = saved[key], now[key]
        if isinstance(before, dict) and isinstance(after, dict):
            found += _unequal(before, after, f"{place}{key}.", unset_matters=unset_matters)
        elif before != after and (unset_matters or (before is not None and after is not None)):
            found.append(f"{place}{key}={after!r}, and was {before!r}")
    return found


def _reading(part: Any) -> str:
    """SHA-256 over a part's vocabulary and how it reads a few texts, which versions of a tokenizer's files may spell anew."""
    own = part.tokenizer
    tokenizer = own.tokenizer if isinstance(own, SentenceTokenizer) else own
    vocabulary = tokenizer.get_vocab()
    ordered = sorted(vocabulary, key=lambda token: (vocabulary[token], token))
    tokens = [vocabulary[token] for token in ordered[:: max(1, len(ordered) // _TOKENS_READ)]]
    texts = [*_TEXTS, *(str(tokenizer.decode([token])) for token in tokens)]
    if isinstance(own, SentenceTokenizer):
        ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        read: list[Any] = [ids, own.bos_token_id, own.eos_token_id]
    else:
        read = [tokenizer(texts)["input_ids"], getattr(part, "stated_tokens", None), getattr(part, "lower", False)]
    digest = hashlib.sha256(json.dumps([sorted(vocabulary.items()), read]).encode())
    return digest.hexdigest()
