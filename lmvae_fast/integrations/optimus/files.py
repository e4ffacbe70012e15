"""The files of an Optimus checkpoint, read without unpickling anything but tensors and plain values.

What the public code (ChunyuanLI/Optimus, on pytorch_transformers 1.2) saves at step N:

=======================================  ============================================================================
``checkpoint-full-N/training.bin``       ``model_state_dict`` of the whole VAE, ``args`` (an argparse.Namespace), and
                                         optimizer, ``iter`` and ``beta``, which are not read
``checkpoint-encoder-N``, ``-decoder-N``  ``config.json`` and ``pytorch_model.bin`` of one half each
=======================================  ============================================================================

Names, behind ``encoder.`` and ``decoder.`` in the whole VAE: BERT's own with ``linear.weight`` [2 nz, h], mu rows first;
GPT-2's own with ``transformer.linear.weight`` [layers h, nz] (memory), ``transformer.linear_emb.weight`` [h, nz] (embedding)
and ``lm_head.weight``, which is ``transformer.wte.weight``.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.documents import read_json
from lmvae_fast.errors import CheckpointError

FULL = "training.bin"
_HALF = "pytorch_model.bin"
_REMEDY = "point to the folder that holds checkpoint-full-N, or checkpoint-encoder-N and checkpoint-decoder-N"


@dataclass(frozen=True)
class OptimusFiles:
    """What a checkpoint holds: weights of both halves under their own names, and what is recorded beside them.

    Attributes:
        encoder, decoder: state dicts, float32. settings: of the training run, where they are recorded.
        configs: ``config.json`` of each half (``encoder``, ``decoder``) that has one.
    """

    encoder: dict[str, Tensor] = field(repr=False)
    decoder: dict[str, Tensor] = field(repr=False)
    settings: dict[str, Any]
    configs: dict[str, dict[str, Any]]


def is_optimus(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder, or training.bin itself, looks like a checkpoint of Optimus."""
    path = Path(folder)
    return path.name == FULL or _find(path, "full") is not None or _find(path, "encoder") is not None


def read_files(folder: str | os.PathLike[str]) -> OptimusFiles:
    """Read a checkpoint: a folder that holds the folders of one step, one of them, or the file training.bin.

    Where the whole VAE and its halves are both there, the whole one is read. Raises CheckpointError where nothing is, for a
    file that is damaged or holds more than tensors and plain values, and for NaN or infinite weights.
    """
    path = Path(folder)
    full = path if path.is_file() else _find(path, "full")
    beside = path.parent if path.is_file() else path
    places = {
        half: _find(beside, half) or _find(beside.parent, half, step_of(beside)) for half in ("encoder", "decoder")
    }
    configs = {half: _read_json(place / "config.json") for half, place in places.items() if place is not None}
    settings: dict[str, Any] = {}
    if full is not None:
        file = full if full.is_file() else full / FULL
        stored = _load(file)
        args = stored.get("args")
        settings = vars(args) if isinstance(args, argparse.Namespace) else {}
        states = _halves(stored.get("model_state_dict", stored), file)
    else:
        absent = [half for half, place in places.items() if place is None]
        if absent:
            raise CheckpointError(
                f"{path} is no checkpoint of Optimus",
                value=f"no {FULL}, and no folder of the {absent[0]}",
                remedy=_REMEDY,
            )
        states = {half: _tensors(_load(place / _HALF), place / _HALF) for half, place in places.items() if place}
    return OptimusFiles(states["encoder"], states["decoder"], settings, {k: v for k, v in configs.items() if v})


def step_of(folder: Path) -> str | None:
    """The step in a folder's name, or None."""
    found = re.fullmatch(r"checkpoint-(?:full-|encoder-|decoder-)?(\d+)", folder.name)
    return found[1] if found else None


def _find(folder: Path, part: str, step: str | None = None) -> Path | None:
    """The folder of a part in a checkpoint's folder, or that folder itself. Raises CheckpointError for several steps."""
    file = FULL if part == "full" else _HALF
    if step is None and (folder / file).is_file() and (part == "full" or f"-{part}" in folder.name):
        return folder
    found = [
        place
        for place in (folder.glob(f"checkpoint-{part}-*") if folder.is_dir() else ())
        if (place / file).is_file() and step in (None, step_of(place))
    ]
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds checkpoints of several steps", value=", ".join(sorted(place.name for place in found)),
            remedy=f"point to the {FULL} of one of them",
        )  # fmt: skip
    return found[0] if found else None


def _load(file: Path) -> dict[str, Any]:
    try:
        # The run's options are a Namespace of plain values; whatever else is not a tensor is refused.
        with torch.serialization.safe_globals([argparse.Namespace]):
            value = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{file} is truncated, corrupt or holds more than tensors and plain values (nothing else is unpickled)",
            value=reason[:200], limit="a file that torch.save wrote", remedy="copy the file again from the source",
        ) from error  # fmt: skip
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file} holds no state dict", value=type(value).__name__, limit="names mapped to tensors"
        )
    return value


def _tensors(state: Any, file: Path) -> dict[str, Tensor]:
    """A state dict in float32, checked; processes that trained together (DataParallel) put module. before all names."""
    good = isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())
    if not good or not state:
        raise CheckpointError(f"{file} holds no state dict", limit="names mapped to tensors", remedy=_REMEDY)
    checked: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"{file}: {name} has NaN or infinite entries", remedy="use an earlier checkpoint")
        checked[str(name).removeprefix("module.")] = value.float() if value.is_floating_point() else value
    return checked


def _halves(state: Any, file: Path) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    foreign = []
    for name, value in _tensors(state, file).items():
        half, _, own = name.partition(".")
        if half in states:
            states[half][own] = value
        else:
            foreign.append(name)
    if foreign or not all(states.values()):
        raise CheckpointError(
            f"{file} is no VAE of Optimus",
            value=f"{len(foreign)} foreign names {foreign[:3]}",
            limit="encoder.*, decoder.*",
        )
    return states


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    values = read_json(file, error=CheckpointError)
    return values if isinstance(values, dict) else {}
