"""What this package keeps, and how it is removed: converted models, logs of faults, tokens and features of runs."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from lmvae_fast.errors import ConfigError
from lmvae_fast.files import locked, made_as, output_errors
from lmvae_fast.pretrained import cache_folder

# By kind: the folder below the cache's, and what the names of its entries are. Nothing else is ever removed.
_SHARED = {"model": ("gguf", r"[0-9a-f]{32}"), "log": ("logs", r"fault-[0-9-]+\.log")}
_OF_RUN = re.compile(r"(tokens|pooled|posteriors)-[0-9a-f]{32}\.safetensors")


@dataclass(frozen=True)
class Entry:
    """One thing that is kept: ``kind`` (model, log, tokens, pooled, posteriors), its size, and days since it was written."""

    kind: str
    path: Path
    size: int
    days: float


def entries(run: Path | None = None) -> list[Entry]:
    """What is kept, largest first: for all of this user's work, or below a run's folder (which must be marked as one).

    Raises ConfigError for a folder that is no run.
    """
    found: list[tuple[str, Path]] = []
    if run is None:
        for kind, (name, pattern) in _SHARED.items():
            folder = cache_folder() / name
            inside = folder.iterdir() if folder.is_dir() else ()
            found += [(kind, path) for path in inside if re.fullmatch(pattern, path.name)]
    else:
        if made_as(run) is None:
            raise ConfigError(f"{run} is no run of ours", remedy="name the output folder of a training run")
        folder = run / "cache"
        inside = folder.iterdir() if folder.is_dir() else ()
        found += [(match[1], path) for path in inside if (match := _OF_RUN.fullmatch(path.name))]
    now = time.time()
    made = [Entry(kind, path, _size(path), (now - path.lstat().st_mtime) / 86400) for kind, path in found]
    return sorted(made, key=lambda entry: -entry.size)


def prune(run: Path | None = None, *, days: float = 0.0) -> list[Entry]:
    """Remove what is older than so many days, and return it. What was removed is made again when it is wanted.

    Raises ConfigError as :func:`entries` does, OutputError where a process is writing to the run or nothing can be removed.
    """
    old = [entry for entry in entries(run) if entry.days >= days]
    if run is not None and old:
        with locked(run, "a training run"):
            _remove(old)
    else:
        _remove(old)
    return old


def _remove(old: list[Entry]) -> None:
    for entry in old:
        with output_errors(entry.path):
            if entry.path.is_dir() and not entry.path.is_symlink():
                shutil.rmtree(entry.path)
            else:
                entry.path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
