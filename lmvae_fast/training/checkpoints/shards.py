"""The part of a run's state that no rank has whole: layers that train in pieces, and the optimizer's moments of them.

Written and read through torch.distributed.checkpoint: every rank writes its pieces, and any number of ranks reads them
again, each the pieces it then holds. The files are safetensors, so that nothing is pickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lmvae_fast.errors import CheckpointError, OutputError
from lmvae_fast.models.sharded_tensors import in_pieces
from lmvae_fast.training.sharding import placed_like


def split(groups: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """What a rank has whole, by group and name; and what it has a piece of, by "group/name"."""
    whole = {group: {name: t for name, t in tensors.items() if not in_pieces(t)} for group, tensors in groups.items()}
    pieces = {f"{group}/{name}": t for group, tensors in groups.items() for name, t in tensors.items() if in_pieces(t)}
    return whole, pieces


def write(folder: Path, pieces: Mapping[str, Tensor]) -> None:
    """Write the pieces of all ranks below ``folder``, fsynced; a collective. Raises OutputError, on every rank."""
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save  # slow to import

    try:
        save(dict(pieces), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        raise OutputError(
            f"cannot write {folder} (earlier checkpoints are untouched)",
            value=f"rank {rank}: {failure}",
            remedy="free space, or choose a folder that every process can write to",
        ) from error


def read(folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What `write` left, by group and name, each held like its parameter; a collective if there are several ranks.

    parameters: by name; an entry of a group is called like its parameter, or "<parameter>/<key>". Raises CheckpointError
    for entries of other parameters or shapes.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    targets: dict[str, Tensor] = {}
    for path, found in stored.items():
        name, size = path.partition("/")[2], getattr(found, "size", ())
        parameter = _parameter_of(name, parameters)
        if parameter is None or parameter.shape != size:
            raise CheckpointError(
                "the checkpoint has pieces of a parameter that this model does not train",
                value=f"{name} {list(size)}",
                remedy="resume with the configuration the run was started with",
            )
        targets[path] = torch.full_like(
            parameter.detach(), float("nan")
        )  # what nobody has written must not pass for weights
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads the pieces of several
        load(targets, storage_reader=HuggingFaceStorageReader(str(folder)))
    groups: dict[str, dict[str, Tensor]] = {}
    for path, tensor in targets.items():
        group, _, name = path.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups


def joined(
    whole: Mapping[str, Mapping[str, Tensor]], folder: Path | None, parameters: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """A checkpoint's groups of whole tensors and the pieces in ``folder``, every entry held like its parameter.

    So a run in pieces goes on from a checkpoint of a whole one, and the other way round.
    """
    pieces = {} if folder is None else read(folder, parameters)
    groups = {}
    for group, tensors in whole.items():
        groups[group] = dict(tensors) | pieces.get(group, {})
        for name, tensor in tensors.items():
            parameter = _parameter_of(name, parameters)
            if parameter is not None and in_pieces(parameter) and parameter.shape == tensor.shape:
                groups[group][name] = placed_like(tensor, parameter)
    return groups


def _parameter_of(name: str, parameters: Mapping[str, Tensor]) -> Tensor | None:
    return parameters.get(name, parameters.get(name.rpartition("/")[0]))
