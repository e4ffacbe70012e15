"""Names under which files are written before they take their own, and the removal of what dead processes left under such names.

A process is known by its number, which means something only on its machine and among the processes that it can see: both are in
the name. What another machine or container left is removed when nothing of it has changed for a day.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import time
from pathlib import Path

TEMPORARY = ".tmp-"
_NAME = re.compile(re.escape(TEMPORARY) + r"([0-9a-f]{8})-([0-9]{1,9})-(.+)", re.DOTALL)
_LONG_DEAD = 86_400.0  # seconds


def temporary_beside(path: Path) -> Path:
    """The name under which this process writes what is to become `path`; what dead ones left under theirs is removed."""
    sweep(path.parent, path.name)
    return path.parent / f"{TEMPORARY}{among()}-{os.getpid()}-{path.name}"


def becoming(name: str) -> str | None:
    """The name that a file of this temporary name is to take; None for a name of another kind."""
    match = _NAME.fullmatch(name)
    return None if match is None else match[3]


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what dead processes left half written in a folder (of one name, if given)."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is None or (name is not None and match[3] != name):
                continue
            if _is_dead(int(match[2])) if match[1] == among() else _is_old(path):
                remove(path)


@functools.cache
def among() -> str:
    """Eight digits for the processes that this one can tell apart by their numbers: of its machine, and of its container."""
    try:
        container = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        container = ""
    return hashlib.sha256(f"{platform.node()} {container}".encode()).hexdigest()[:8]


def remove(path: Path) -> None:
    """Remove a file or a folder, or as much of it as can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _is_dead(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # there, and another user's
        pass
    return False


def _is_old(path: Path) -> bool:
    return time.time() - path.lstat().st_mtime > _LONG_DEAD
