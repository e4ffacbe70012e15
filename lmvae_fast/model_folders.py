"""A Hugging Face model folder's headers against its configuration: nothing is allocated that the folder does not hold."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from lmvae_fast.errors import CheckpointError
from lmvae_fast.memory import check_memory
from lmvae_fast.tensor_files import FLOATING, Header, read_headers, weight_files

logger = logging.getLogger(__name__)

#: What configurations call their number of layers.
_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)


def check_folder(auto_class: Any, folder: Path, part: str, may_lack: Iterable[str], options: dict[str, Any]) -> None:
    """Before a model is loaded: its files hold as many numbers as its configuration asks for, all of them floats.

    Args:
        auto_class: what it would be loaded with. part: as what, for messages. may_lack: beginnings of the names of weights
            that the files need not hold. options: of the loading (``dtype``, ``trust_remote_code``).

    Raises:
        CheckpointError: more layers or numbers than the files hold, weights that are no floats. MemoryLimitError: more than
            the machine has room for.
    """
    files = weight_files(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=options.get("trust_remote_code", False))
    if not files or getattr(config, "quantization_config", None) is not None:
        return  # transformers says what it lacks; quantised weights are packed, each kind in its way
    headers: dict[str, Header] = {}
    for file in files:
        if file.suffix == ".safetensors":
            headers |= read_headers(file)
    stored = sum(header.numbers for header in headers.values()) or sum(file.stat().st_size for file in files)
    _check_layers(config, len(headers) or stored, part, folder)
    model = _without_numbers(auto_class, config, options)
    if model is None:
        return
    beginnings = tuple(may_lack)
    named = {name: value for name, value in model.named_parameters() if not name.startswith(beginnings or ("\0",))}
    wanted = sum(parameter.numel() for parameter in named.values())
    if wanted > stored:
        raise CheckpointError(
            f"the {part}'s configuration asks for more numbers than {folder} holds",
            value=f"{wanted:,} numbers" + _missing(named, headers),
            limit=f"{stored:,} in {', '.join(file.name for file in files[:3])}",
            remedy="restore configuration and weights from one copy",
        )  # fmt: skip
    _check_dtypes(named, headers, part, folder)
    dtype = options.get("dtype")
    size = (dtype if isinstance(dtype, torch.dtype) else torch.float32).itemsize
    kept = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    check_memory(f"the {part} {folder}", "take a smaller one, or a machine with more memory", wanted * size + kept)


def _check_layers(config: Any, most: int, part: str, folder: Path) -> None:
    """Each layer has a tensor at least: without this, layers without number would be built one by one."""
    for owner in {id(part): part for part in (config, *_parts(config))}.values():
        for name in _LAYERS:
            layers = getattr(owner, name, None)
            if isinstance(layers, int) and layers > most:
                raise CheckpointError(
                    f"the {part}'s configuration asks for more layers than {folder} holds tensors", value=f"{name}={layers}",
                    limit=most, remedy="restore configuration and weights from one copy",
                )  # fmt: skip


def _parts(config: Any) -> list[Any]:
    return [value for value in vars(config).values() if hasattr(value, "model_type") and hasattr(value, "to_dict")]


def _without_numbers(auto_class: Any, config: Any, options: dict[str, Any]) -> nn.Module | None:
    """The model on the meta device, where tensors have shapes only; None for one that cannot be built there."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            if issubclass(auto_class, _BaseAutoModelClass):
                return auto_class.from_config(config, trust_remote_code=options.get("trust_remote_code", False))
            return auto_class(config)
    except Exception as error:  # what is wrong with it is said when it is loaded
        logger.debug("no %s on the meta device: %s", type(config).__name__, error)
        return None


def _missing(named: dict[str, Any], headers: dict[str, Header]) -> str:
    if not headers:
        return ""
    absent = sorted(name for name in named if not any(own.endswith(name) or name.endswith(own) for own in headers))
    return f", {len(absent)} missing {absent[:3]}" if len(absent) < len(named) else ""


def _check_dtypes(named: dict[str, Any], headers: dict[str, Header], part: str, folder: Path) -> None:
    """Weights that are integers, truth values or complex numbers would be cast in silence."""
    ends = {name.rpartition(".")[0].rpartition(".")[2] + "." + name.rpartition(".")[2] for name in named}
    for name, header in headers.items():
        place, _, last = name.rpartition(".")
        if header.dtype in FLOATING or f"{place.rpartition('.')[2]}.{last}" not in ends:
            continue
        if any(name.endswith(own) or own.endswith(name) for own in named) and header.numbers:
            raise CheckpointError(
                f"the {part}'s weight {name} in {folder} is of no floating dtype", value=header.dtype,
                limit=", ".join(sorted(FLOATING)), remedy="save it as it was trained; dequantise a quantised model first",
            )  # fmt: skip
