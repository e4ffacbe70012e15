"""Checkpoints that survive a kill at any instant.

A checkpoint is a folder `step-00000120` with safetensors files, `state.json`, `pieces/` where ranks hold some of the state
in pieces, and, last of all, `COMPLETE.json`: the manifest with the size and sha256 of every file. Writing: all files into a
temporary folder beside it, each fsynced; fsync the folder; rename it; then the manifest, itself by temporary file and
rename. A folder without its manifest does not count, so whatever instant the process dies at, the newest folder *with* one
is whole.

Nothing is pickled: optimizer state is flattened by parameter name, random states are tensors, the rest is JSON.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lmvae_fast.documents import read_json
from lmvae_fast.errors import CheckpointError
from lmvae_fast.files import (
    TEMPORARY,
    check_writable,
    fsync_folder,
    output_errors,
    replacing,
    sha256_file,
    write_json,
    write_tensors,
)
from lmvae_fast.tensor_files import read_tensors

FORMAT = "lmvae_fast.checkpoint"
VERSION = 1
MARKER = "COMPLETE.json"
STATE = "state.json"
PIECES = "pieces"
_NAME = re.compile(r"^step-(\d{8,})(?:\.(\d+))?$")


@dataclass(frozen=True)
class Checkpoint:
    """What `load` returns: groups of tensors by name (on the CPU), the JSON state, and the folder of pieces, if any."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    pieces: Path | None = None


def is_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint's."""
    return _NAME.match(name) is not None


def _order(path: Path) -> tuple[int, int]:
    """(step, copy) of a checkpoint folder's name; (-1, 0) for any other name."""
    match = _NAME.match(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder that have their manifest, newest first; [] if the folder does not exist."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _order(path)[0] >= 0 and (path / MARKER).is_file()]
    return sorted(found, key=_order, reverse=True)


def step_of(path: Path) -> int:
    """The step of a checkpoint folder's name, -1 for any other name."""
    return _order(path)[0]


def of_step(folder: Path, step: int) -> Path | None:
    """The complete checkpoint of a step, or None."""
    return next((path for path in complete(folder) if _order(path)[0] == step), None)


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    protect: int | None = None,
    write_pieces: Callable[[Path], None] | None = None,
) -> Path:
    """Write the checkpoint of `step` below `folder`, then remove all but the newest `keep` (and that of `protect`).

    tensors: groups, one safetensors file each, e.g. {"model": {...}, "optimizer": {...}}. state: JSON values.
    write_pieces: fills a folder, and fsyncs its files, with what several ranks write together.
    An existing checkpoint of the same step is never overwritten: the new one is `step-N.1` and the old one is removed
    only when the new one is complete. Raises OutputError (disk full, read-only ...) and then leaves every earlier
    checkpoint as it was.
    """
    name = f"step-{step:08d}"
    copies = [_order(path)[1] for path in folder.glob(f"{name}*") if _order(path)[0] == step]
    final = folder / (name if not copies else f"{name}.{max(copies) + 1}")
    temporary = folder / f"{TEMPORARY}{os.getpid()}-{final.name}"
    consequence = "earlier checkpoints are untouched"
    with output_errors(final, consequence):
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # of a dead process that had our id
            temporary.mkdir(parents=True)
            for group, values in tensors.items():
                write_tensors(temporary / f"{group}.safetensors", values, {"format": "pt"})
            write_json(temporary / STATE, state)
            if write_pieces is not None:
                write_pieces(temporary / PIECES)
                fsync_folder(temporary / PIECES)
            files = {
                path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                for path in _files(temporary)
            }
            fsync_folder(temporary)
            os.rename(temporary, final)
            fsync_folder(folder)
            with replacing(final / MARKER, consequence) as marker:
                write_json(marker, {"format": FORMAT, "version": VERSION, "step": step, "files": files})
        except Exception:
            # What has no manifest is of no use to anybody and would fill the disk further.
            shutil.rmtree(temporary, ignore_errors=True)
            if not (final / MARKER).exists():
                shutil.rmtree(final, ignore_errors=True)
            raise
    prune(folder, keep, protect)
    return final


def prune(folder: Path, keep: int, protect: int | None = None) -> None:
    """Remove all but the newest `keep` complete checkpoints and that of step `protect` (the best evaluation's), and
    what interrupted writers left behind.

    One process writes to a folder at a time; what is temporary or has no manifest is therefore dead.
    """
    steps: list[int] = []
    for path in complete(folder):
        step = _order(path)[0]
        if step in steps or (len(steps) >= keep and step != protect):
            # The manifest goes first: a kill half-way through must not leave a folder that looks whole.
            with contextlib.suppress(OSError):
                (path / MARKER).unlink()
            shutil.rmtree(path, ignore_errors=True)
        else:
            steps.append(step)
    for path in folder.iterdir():
        unfinished = _order(path)[0] >= 0 and not (path / MARKER).exists()
        if unfinished or path.name.startswith(TEMPORARY):
            shutil.rmtree(path, ignore_errors=True)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read and verify one checkpoint folder.

    Raises CheckpointError when it does not exist, is of another kind or a newer version, was never completed, misses a
    file, or a file has another size or sha256 than its manifest says.
    """
    path = Path(path)
    remedy = "resume from another checkpoint of the run"
    if not path.is_dir():
        raise CheckpointError("no checkpoint folder there", value=path, remedy="check the path")
    manifest = _read_json(path / MARKER, "the checkpoint was never completed, or is of another kind")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this package", limit=f"format {FORMAT!r}", remedy=remedy)
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has another format version",
            value=manifest.get("version"),
            limit=VERSION,
            remedy="use the version of lmvae_fast that wrote it",
        )
    files = manifest.get("files")
    files = files if isinstance(files, dict) else {}
    whole = all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values())
    if STATE not in files or not whole:
        raise CheckpointError(f"{path / MARKER} does not list the checkpoint's files", remedy=remedy)
    tensors = {}
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing", remedy=remedy)
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"{file} is truncated or padded",
                value=f"{file.stat().st_size} bytes",
                limit=f"{expected['bytes']} bytes",
                remedy=remedy,
            )
        if sha256_file(file) != expected["sha256"]:
            raise CheckpointError(f"{file} is corrupt: its sha256 is not the manifest's", remedy=remedy)
        if file.suffix == ".safetensors" and file.parent == path:
            tensors[file.stem] = read_tensors(file)
    state = _read_json(path / STATE, "the checkpoint's state is missing")
    return Checkpoint(
        path, tensors, state, path / PIECES if any(name.startswith(f"{PIECES}/") for name in files) else None
    )


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint below `folder` that verifies; None if there has never been one.

    A damaged newer one is passed over with a warning that names it. Raises CheckpointError when all are damaged.
    """
    candidates = complete(folder)
    for path in candidates:
        try:
            return load(path)
        except CheckpointError as error:
            warnings.warn(f"skipping a damaged checkpoint, trying the one before it: {error}", stacklevel=2)
    if candidates:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged",
            value=", ".join(path.name for path in candidates),
            remedy="start anew in another output_dir",
        )
    return None


def set_aside(folder: Path, after: Path) -> None:
    """Rename the checkpoints newer than `after` to `aside-...`: damaged ones, or another future of the run.

    Left among the others they would count as the newest and crowd out what the resumed run writes.
    """
    for path in complete(folder):
        if _order(path) > _order(after):
            aside = path.with_name(f"aside-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            with output_errors(aside):
                os.rename(path, aside)


def check_space(folder: Path, tensors: Mapping[str, Tensor], keep: int) -> None:
    """Before training: `folder` can be written and has room for keep + 2 checkpoints (those kept, the best one and the
    one being written), each of the weights and AdamW's two moments. Raises OutputError."""
    one = 3 * sum(value.numel() * value.element_size() for value in tensors.values()) + (1 << 16)
    present = sum(file.stat().st_size for path in complete(folder) for file in _files(path))
    check_writable(folder, max((keep + 2) * one - present, one))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _read_json(path: Path, missing: str) -> Any:
    if not path.exists():
        raise CheckpointError(f"{missing}: no {path.name} in {path.parent}", remedy="choose a complete one")
    return read_json(path, error=CheckpointError)
