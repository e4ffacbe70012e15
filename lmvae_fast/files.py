"""Files that are either whole or not there, in folders that are ours: what everything written to disk is built on.

The order is always: write under a temporary name in the same folder, fsync, rename, fsync the folder. A kill (or a
power cut) between any two of these leaves the old state or the new one, and a temporary that the next writer sweeps away.

Nothing is deleted or overwritten that was not made here: an output folder carries a mark that says what it was made as, and a
writer refuses, before any work, one that is neither empty nor marked as its own kind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lmvae_fast.documents import read_object
from lmvae_fast.errors import DataError, OutputError
from lmvae_fast.temporaries import TEMPORARY, becoming, remove, sweep, temporary_beside
from lmvae_fast.tensor_files import check_readable_again

__all__ = ["TEMPORARY", "sweep", "temporary_beside"]
MARK, LOCK = ".lmvae_fast.json", ".lmvae_fast.lock"
GENERATOR = "lmvae_fast-drawing"  # what pages and pictures say of who made them, within their first bytes
_MARK_FORMAT = "lmvae_fast-output-1"
#: What is found in saved encoders and decoders, for folders that were written without a list of their files.
_OF_PARTS = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|preprocessor_config|modules|prompts"
    r"|sentence_\w+_config|config_sentence_transformers|adapter_config|.+\.index)\.json|(vocab|merges)\.txt|README\.md"
    r"|((pytorch_|adapter_)?model|consolidated)[-\w]*\.(safetensors|bin)|.+\.(model|bpe|tiktoken|jinja|codes)|encoder\.json"
)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2(2)


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
        # Of torchao's tensors the codes: few operations are defined on them.
        flat = getattr(tensor, "qdata", tensor).detach().reshape(-1)
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
    check_readable_again(path)
    save_file(storable(tensors), str(path), dict(metadata) if metadata else None)
    share_as_folder(path)
    fsync_file(path)


def share_as_folder(path: Path) -> None:
    """Give a file its folder's permissions: who may read that may read it. (safetensors keeps files to their owner.)"""
    with contextlib.suppress(OSError):
        path.chmod(path.parent.stat().st_mode & 0o666)


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
    temporary = temporary_beside(path)
    with output_errors(path, consequence):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            share_as_folder(temporary)
            os.replace(temporary, path)
            fsync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def exchange(one: Path, other: Path) -> bool:
    """Two names change places in one step; False where the system or the file system cannot do that."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(one))


def _aside(folder: Path) -> Path:
    folder = folder.absolute()  # "" and "." have no name
    return folder.with_name(f".{folder.name}.replaced") if folder.name else folder / ".replaced"


def replace_folder(temporary: Path, folder: Path) -> None:
    """Put a complete folder in place of another; at every instant one of the two is whole.

    Where the system can exchange two names, one of them is there under its name at every instant too. Elsewhere the old one
    stands aside for a moment, and :func:`recover_folder` finds it there.
    """
    if folder.exists():
        if exchange(temporary, folder):
            fsync_folder(folder.parent)
            remove(temporary)  # it is the old one now
            return
        aside = _aside(folder)
        remove(aside)
        folder.rename(aside)
        try:
            temporary.rename(folder)
        except OSError:
            aside.rename(folder)
            raise
        fsync_folder(folder.parent)
        remove(aside)
    else:
        temporary.rename(folder)
        fsync_folder(folder.parent)


def recover_folder(folder: Path) -> None:
    """Before a folder is read or written: undo a replacement that was killed while the old one stood aside."""
    aside = _aside(folder)
    with contextlib.suppress(OSError):
        if aside.is_dir():
            if folder.exists():
                remove(aside)
            else:
                aside.rename(folder)


def made_as(folder: Path) -> str | None:
    """The kind of output that a folder was made as; None for one without our mark."""
    try:
        mark = read_object(folder / MARK)
    except DataError:
        return None
    kind = mark.get("kind") if mark.get("format") == _MARK_FORMAT else None
    return kind if isinstance(kind, str) else None


def files_inside(folder: Path) -> list[str]:
    """Names of all files in a folder and in those within it, relative to it, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not _is_folder(path))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def list_of_files(value: Any) -> list[str] | None:
    """What a record says under ``files``; None where it says nothing, as those of earlier versions."""
    return value if isinstance(value, list) and all(isinstance(name, str) for name in value) else None


def check_ours(
    folder: Path, *kinds: str, contents: Collection[str] | None = None, replaced: bool | None = None
) -> None:
    """Before any work: a folder that is not there, is empty, or was made here as one of `kinds`.

    contents: of a folder that is to be replaced as a whole, all names that one of its kind holds. replaced: whether it is, of
    kinds that hold no other names than their marks list; by default where `contents` is given. Raises OutputError for any
    other folder, for a file, and for one that holds something that was not written with it.
    """
    check_readable_again(folder)
    recover_folder(folder)
    with output_errors(folder):
        if not folder.exists() and not folder.is_symlink():
            return
        if not folder.is_dir():
            raise OutputError(f"{folder} is no folder", value="a file of that name", remedy="choose another output")
        inside = sorted(path.name for path in folder.iterdir() if becoming(path.name) != MARK)
    if not inside:  # but for what a writer left that was killed at its first file
        return
    kind = made_as(folder)
    if kind not in kinds:
        raise OutputError(
            f"{folder} is neither empty nor a {kinds[0]} of ours, and is left alone",
            value=f"a {kind}" if kind else f"it holds {', '.join(inside[:3])}" + (", ..." if len(inside) > 3 else ""),
            limit=f"an empty folder, or one made as a {' or a '.join(kinds)}",
            remedy="choose another output",
        )
    if contents is not None or replaced:
        check_contents(folder, contents, list_of_files(read_object(folder / MARK).get("files")))


def check_file_ours(path: Path) -> None:
    """Before any work: OutputError where a file is there that was not made here, which says so in its first bytes."""
    with output_errors(path):
        if not path.exists() or (path.is_file() and path.stat().st_size == 0):
            return
        if not path.is_file():
            raise OutputError(f"{path} is no file", remedy="choose another output")
        with open(path, "rb") as file:
            ours = GENERATOR.encode() in file.read(4096)
    if not ours:
        raise OutputError(f"{path} is there and was not made here, and is left alone", remedy="choose another output")


def check_contents(folder: Path, contents: Collection[str] | None, files: Collection[str] | None = None) -> None:
    """OutputError where a folder that is to be replaced holds more than what was written there, within its folders too.

    contents: names of its entries; None for those of `files`. files: what was written, as `files_inside` names it; None where
    that is not known, and then everything within its folders counts that encoders and decoders are saved with.
    """
    known = {*(contents or ()), MARK, LOCK}
    strangers = []
    for name in files_inside(folder):
        first, _, rest = name.partition("/")
        if contents is not None and first not in known:
            strangers.append(first)
        elif name not in known and (rest or contents is None):
            ours = _OF_PARTS.fullmatch(name.rpartition("/")[2]) if files is None else name in files
            strangers += [] if ours else [name]
    if contents is not None:  # folders that hold nothing
        strangers += sorted({path.name for path in folder.iterdir()} - known)
    strangers = list(dict.fromkeys(strangers))
    if strangers:
        raise OutputError(
            f"{folder} would be replaced and holds something that was not written with it",
            value=", ".join(strangers[:3]),
            remedy="move that elsewhere, or choose another output",
        )


def claim(folder: Path, kind: str, *also: str) -> None:
    """Make a folder ours, as `kind`, and mark it so; one that is ours already (as that or one of `also`) keeps its mark.

    Raises OutputError as check_ours does, or when it cannot be written.
    """
    check_ours(folder, kind, *also)
    if made_as(folder) is None:
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        mark(folder, kind)


def mark(folder: Path, kind: str, *, complete: bool = False) -> None:
    """Write the mark that says what a folder was made as; of a complete one, which is only ever replaced, all that it holds."""
    files = {"files": files_inside(folder)} if complete else {}
    with replacing(folder / MARK) as temporary:
        write_json(temporary, {"format": _MARK_FORMAT, "kind": kind, **files})


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Within the block no other process that asks in the same way writes to a folder; it must exist.

    Raises OutputError, naming who does, where another one is at it. A lock ends with its process, however that ends.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = folder / LOCK
    with output_errors(path):
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as the block
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise OutputError(
                f"another process is writing {what} in {folder}", value=file.read(300).strip() or None,
                remedy="wait for it, stop it, or choose another output",
            ) from error  # fmt: skip
        except OSError:  # a file system without locks
            pass
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


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
            f"cannot write {path}" + (f" ({consequence})" if consequence else ""), value=str(error),
            remedy="free space on that disk or choose another folder" if full else "choose a folder you can write to",
        ) from error  # fmt: skip


def check_writable(folder: Path, needed_bytes: int = 0) -> None:
    """Make sure, before hours of work, that `folder` exists, takes a file and has `needed_bytes` free.

    Raises OutputError naming the folder, the free and the needed space.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        trial = temporary_beside(folder / "trial")
        try:
            with open(trial, "wb") as file:
                file.write(b"0" * 4096)
                file.flush()
                os.fsync(file.fileno())
        finally:
            trial.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OutputError(
            f"not enough free space in {folder}", value=f"{free / 1e6:.1f} MB free",
            limit=f"about {needed_bytes / 1e6:.1f} MB for the checkpoints that are kept at a time",
            remedy="free space, choose another output_dir or lower keep_checkpoints",
        )  # fmt: skip
