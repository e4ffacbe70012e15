"""Folders of sentence-transformers: what stands behind the transformer (pooling, dense layers, L2 norm), by `modules.json`.

The chain of sentence-T5 is Transformer, Pooling (mean), Dense (without bias, no activation), Normalize. Layout of the files:
sentence-transformers 2 to 5 (`modules.json`, `1_Pooling/config.json`, `2_Dense/config.json` with its weights).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils import cached_file

from lmvae_fast.documents import read_json
from lmvae_fast.errors import CheckpointError, LMVAEError
from lmvae_fast.pretrained import resolve_source
from lmvae_fast.tensor_files import check_finite, read_tensors

MODULES = "modules.json"
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")  # of a repository of the hub
_QUIET: dict[str, bool] = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}

#: Names that the hub has been asked about in this process; what it has is in the cache since.
_asked: set[str] = set()

#: Flag of a pooling configuration -> our name of it.
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
_OURS = ("pooler", "segments")  # which sentence-transformers does not have: written by name, and no folder of theirs
_KNOWN = ("Transformer", "Pooling", "Dense", "Normalize")
_ACTIVATIONS: dict[str, type[nn.Module]] = {"Identity": nn.Identity, "Tanh": nn.Tanh}


@dataclass(frozen=True)
class SentenceModules:
    """What a folder says of its sentence vectors.

    Attributes:
        transformer: folder of the transformer, or its name on the hub.
        pooling: ``mean``, ``cls`` or ``last``; of folders that we wrote also ``pooler`` or ``segments``.
        normalize: whether the result is L2-normalised.
        dense: folders of the dense layers in between, in order.
        max_tokens: the most tokens read of a sentence, or None. lower: whether sentences are lowered first.
    """

    transformer: str
    pooling: str
    normalize: bool
    dense: tuple[Path, ...] = ()
    max_tokens: int | None = None
    lower: bool = False


def read_modules(name: str) -> SentenceModules | None:
    """What `modules.json` says, in a folder, a packaged model or a repository of the hub; None where there is no such file.

    Raises CheckpointError for a module, a pooling or an order of modules that we cannot honour exactly, by its name.
    """
    try:
        folder = Path(resolve_source(name))
    except CheckpointError:  # a package that is not installed: loading it says so
        return None
    of_hub = None if folder.exists() else _of_hub(name)
    folder = of_hub or folder
    if not (folder / MODULES).is_file():
        return None
    entries = _json(folder / MODULES)
    entries = entries if isinstance(entries, list) else []
    if not entries or not all(isinstance(entry, dict) and {"type", "path"} <= entry.keys() for entry in entries):
        raise CheckpointError(f"{folder / MODULES} is no list of modules", remedy="restore it from a copy")
    kinds = [str(entry["type"]).rpartition(".")[2] for entry in entries]
    for kind, entry in zip(kinds, entries, strict=True):
        if kind not in _KNOWN:
            raise CheckpointError(
                f"{folder} has a module that we do not honour", value=entry["type"], limit=", ".join(_KNOWN),
                remedy="use an encoder of these modules alone",
            )  # fmt: skip
    middle = kinds[2:-1] if kinds[-1:] == ["Normalize"] else kinds[2:]
    if kinds[:2] != ["Transformer", "Pooling"] or any(kind != "Dense" for kind in middle):
        raise CheckpointError(
            f"{folder}: its modules stand in an order that we do not honour", value=", ".join(kinds),
            limit="Transformer, Pooling, any Dense, perhaps Normalize",
        )  # fmt: skip
    paths = [folder / str(entry["path"]) for entry in entries]
    # sentence_bert_config.json; of old versions sentence_roberta_config.json and the like
    options = _optional_json(next(iter(sorted(paths[0].glob("sentence_*_config.json"))), paths[0] / "none"))
    prompt = _optional_json(folder / "config_sentence_transformers.json").get("default_prompt_name")
    if prompt is not None:
        raise CheckpointError(
            f"{folder} puts a prompt before every sentence, which we do not", value=prompt,
            remedy="set default_prompt_name to null in config_sentence_transformers.json",
        )  # fmt: skip
    transformer = name if of_hub is not None and paths[0] == folder else str(paths[0])
    return SentenceModules(
        transformer, _pooling(paths[1] / "config.json"), kinds[-1] == "Normalize",
        tuple(path for path, kind in zip(paths, kinds, strict=True) if kind == "Dense"),
        options.get("max_seq_length"), bool(options.get("do_lower_case", False)),
    )  # fmt: skip


def _of_hub(name: str) -> Path | None:
    """The folder of a repository with modules: in the local cache, or brought there where transformers would bring it."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    if not _ID.fullmatch(name):
        return None
    found: Any = None
    with contextlib.suppress(OSError, ValueError):  # no such repository: loading it says so
        # A path, None for what is not known, or a mark that the repository has no such file.
        found = try_to_load_from_cache(name, MODULES)
        if found is None and name not in _asked:  # a configuration is resolved often, and an absent hub is waited for
            _asked.add(name)
            found = cached_file(name, MODULES, **_QUIET)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    entries = _json(folder / MODULES)
    names = (
        [str(entry.get("path", "")) for entry in entries if isinstance(entry, dict)]
        if isinstance(entries, list)
        else []
    )
    # What stands behind the transformer, and its limits; its weights are loaded by name.
    wanted = [f"{part}/*" for part in names if part] + ["sentence_*_config.json", "config_sentence_transformers.json"]
    with contextlib.suppress(OSError, ValueError):  # what is missing in the cache, then, is said when it is read
        snapshot_download(name, revision=folder.name, allow_patterns=wanted)
    return folder


def own_pooling(name: str) -> dict[str, Any]:
    """Fields ``pooling`` and ``normalize`` as `modules.json` has them; {} where there is none."""
    modules = read_modules(name)
    return {} if modules is None else {"pooling": modules.pooling, "normalize": modules.normalize}


def _pooling(path: Path) -> str:
    values = _json(path)
    if isinstance(values, dict) and isinstance(values.get("pooling_mode"), str):
        mode = str(values["pooling_mode"])
        found = [{"mean": "mean", "cls": "cls", "lasttoken": "last"}.get(mode, mode)]
    else:
        flags = values if isinstance(values, dict) else {}
        found = [str(_POOLINGS.get(k, k)) for k, v in flags.items() if k.startswith("pooling_mode_") and v is True]
    if len(found) != 1 or found[0] not in (*_POOLINGS.values(), *_OURS):
        raise CheckpointError(
            f"{path}: we do not pool so", value=", ".join(found) or "(nothing)", limit="one of mean, cls, last token",
            remedy="use an encoder of one of these",
        )  # fmt: skip
    return found[0]


def load_dense(modules: SentenceModules) -> nn.Sequential | None:
    """The dense layers with their weights, in float32; None where there are none. Raises CheckpointError."""
    layers: list[nn.Module] = []
    for folder in modules.dense:
        values = _json(folder / "config.json")
        name = str(values.get("activation_function", "")).rpartition(".")[2] if isinstance(values, dict) else ""
        if name not in _ACTIVATIONS:
            raise CheckpointError(f"{folder}: we do not have its activation", value=name, limit=", ".join(_ACTIVATIONS))
        try:
            weights = _weights(folder)
            if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
                raise TypeError("its weights are no tensors by name")
            state = {str(key).removeprefix("linear."): value for key, value in weights.items()}
            sizes = (values["out_features"], values["in_features"])
            if not all(value.is_floating_point() for value in state.values()) or tuple(state["weight"].shape) != sizes:
                raise TypeError(
                    f"its weight is {state['weight'].dtype} {list(state['weight'].shape)}, not {list(sizes)}"
                )
            linear = nn.Linear(sizes[1], sizes[0], bias=bool(values.get("bias", True)))
            linear.load_state_dict({key: value.float() for key, value in state.items()})
            check_finite(state, folder)
        except (LMVAEError, MemoryError):
            raise
        except Exception as error:  # a damaged or foreign file ends in errors of every kind
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"the dense layer in {folder} cannot be read: {reason}", remedy="restore it from a copy"
            ) from error
        layers.append(linear)
        if name != "Identity":
            layers.append(_ACTIVATIONS[name]())
    return nn.Sequential(*layers) if layers else None


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "model.safetensors").is_file():
        return read_tensors(folder / "model.safetensors")
    # Tensors alone, as transformers reads its own files of this kind: nothing in them is executed.
    return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)


def write_modules(
    folder: Path,
    *,
    pooling: str,
    normalize: bool,
    width: int,
    dense: nn.Sequential | None,
    max_tokens: int | None,
    lower: bool,
) -> None:
    """Write beside a saved transformer what :func:`read_modules` reads; `width` is the transformer's."""
    kinds = ["Transformer", "Pooling", *["Dense"] * sum(isinstance(m, nn.Linear) for m in dense or ())]
    kinds += ["Normalize"] if normalize else []
    entries = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / MODULES).write_text(json.dumps(entries, indent=2))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": max_tokens, "do_lower_case": lower})
    )
    for entry in entries[1:]:
        (folder / str(entry["path"])).mkdir()
    flags: dict[str, Any] = {flag: pooling == name for flag, name in _POOLINGS.items()}
    if pooling in _OURS:
        flags = {"pooling_mode": pooling}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": width, **flags}))
    modules = list(dense or ())
    for i, linear in enumerate(module for module in modules if isinstance(module, nn.Linear)):
        after = modules[modules.index(linear) + 1 :][:1]
        name = "tanh.Tanh" if after and isinstance(after[0], nn.Tanh) else "linear.Identity"
        place = folder / f"{2 + i}_Dense"
        values = {
            "in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None,
            "activation_function": f"torch.nn.modules.{name}",
        }  # fmt: skip
        (place / "config.json").write_text(json.dumps(values))
        state = {f"linear.{key}": value.detach().cpu().contiguous() for key, value in linear.state_dict().items()}
        save_file(state, place / "model.safetensors")


def _json(path: str | os.PathLike[str]) -> Any:
    return read_json(path, error=CheckpointError)


def _optional_json(path: Path) -> dict[str, Any]:
    values = _json(path) if path.is_file() else {}
    return values if isinstance(values, dict) else {}
