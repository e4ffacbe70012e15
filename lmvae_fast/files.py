"""Files that are either whole or not there: the few primitives that everything written to disk is built on.

The order is always: write under a temporary name in the same folder, fsync, rename, fsync the folder. A kill (or a
power cut) between any two of these leaves the old state or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lmvae_fast.errors import OutputError

TEMPORARY = ".tmp-"


def fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable; a file system that cannot (some network ones) is left to its own ways."""
    with contextlib.suppress(OSError):
        fsync_file(path)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor without a copy when it is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and values; independent of the mapping's order and of the device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def sampled_fingerprint(tensors: Mapping[str, Tensor], samples: int = 256) -> str:
    """sha256 over names, shapes and evenly spaced values: as good as the whole for telling two models apart, and quick."""
    sampled = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().reshape(-1)
        sampled[f"{name} {tuple(tensor.shape)}"] = flat[:: max(1, flat.numel() // samples)]
    return fingerprint_tensors(sampled)


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors wants them: contiguous, on the CPU, none sharing memory with another."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        address = tensor.untyped_storage().data_ptr()
        if address in seen or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(address)
        result[name] = tensor
    return result


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file and fsync it (not atomic by itself: the caller renames)."""
    save_file(storable(tensors), str(path), dict(metadata) if metadata else None)
    fsync_file(path)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN, no Infinity) and fsync it (not atomic by itself: the caller renames)."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path, consequence: str = "") -> Iterator[Path]:
    """A temporary path beside `path` that takes its name at the end of the block, unless the block raises.

    The block writes and fsyncs the file. Raises OutputError where the folder cannot be written.
    """
    temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{path.name}"
    with output_errors(path, consequence):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
            fsync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def replace_folder(temporary: Path, folder: Path) -> None:
    """Put a complete folder in place of another; at every instant one of the two is whole."""
    old = folder.with_name(f".{folder.name}-old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    fsync_folder(folder.parent)


@contextlib.contextmanager
def output_errors(path: Path, consequence: str = "") -> Iterator[None]:
    """Turn failures to write into OutputError that names the path and what to do."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space" in str(error)
        raise OutputError(
            f"cannot write {path}" + (f" ({consequence})" if consequence else ""),
            value=str(error),
            remedy="free space on that disk or choose another folder" if full else "choose a folder you can write to",
        ) from error


def check_writable(folder: Path, needed_bytes: int = 0) -> None:
    """Make sure, before hours of work, that `folder` exists, takes a file and has `needed_bytes` free.

    Raises OutputError naming the folder, the free and the needed space.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=TEMPORARY) as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OutputError(
            f"not enough free space in {folder}",
            value=f"{free / 1e6:.1f} MB free",
            limit=f"about {needed_bytes / 1e6:.1f} MB for the checkpoints that are kept at a time",
            remedy="free space, choose another output_dir or lower keep_checkpoints",
        )
