"""Memory and disk: what is there, and an error instead of the end where memory is not enough."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lmvae_fast.errors import MemoryLimitError

_PRESENT, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61  # of an entry of /proc/self/pagemap
_NO_MEMORY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed", "negative dimension")


def available(device: torch.device | str = "cpu") -> int | None:
    """Bytes that a program may still take on a device without another one's loss; None where the system does not say."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    found = [_of_the_machine(), _of_the_group()]
    return min((value for value in found if value is not None), default=None)


def _of_the_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _of_the_group() -> int | None:
    """What a container is allowed beside what it has."""
    for most, now in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            return max(int(Path(most).read_text()) - int(Path(now).read_text()), 0)
    return None


def free_disk(path: Path) -> int:
    """Bytes free on the disk that a path is or would be on."""
    path = path.absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free


@contextlib.contextmanager
def memory_guard(what: str, remedy: str, *, needed: int = 0, device: torch.device | str = "cpu") -> Iterator[None]:
    """Around an allocation whose size somebody else decides: MemoryLimitError before it where ``needed`` bytes are more than
    the device has, and in place of whatever is raised when memory runs out within.

    Args:
        what: is made, for the message. remedy: which setting helps.
    """
    check_memory(what, remedy, needed, device)
    try:
        yield
    except (MemoryError, RuntimeError, OverflowError) as error:
        message = str(error).strip()
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError, OverflowError))
        if isinstance(error, MemoryLimitError) or not (memory or any(m in message for m in _NO_MEMORY)):
            raise
        lines = [line for line in message.splitlines() if any(m in line for m in _NO_MEMORY)] or [message]
        raise MemoryLimitError(f"out of memory in {what}", value=lines[0][:300] or None, remedy=remedy) from error


def check_memory(what: str, remedy: str, needed: int, device: torch.device | str = "cpu") -> None:
    """Raises MemoryLimitError where ``needed`` bytes are more than the device has to give."""
    free = available(device) if needed else None
    if free is not None and needed > free:
        raise MemoryLimitError(
            f"not enough memory for {what}", value=f"about {_size(needed)} needed", limit=f"{_size(free)} free on {device}",
            remedy=remedy,
        )  # fmt: skip


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 10**8 else f"{count / 1e6:,.1f} MB"


def give_back(tensors: Iterable[Tensor]) -> None:
    """Let the system have the memory of weights that lie in a mapped file, as safetensors loads them, and are not read for a
    while: what is read again after all comes from the file. On other systems, and for other tensors, nothing happens: also not
    for one with a page that was written to, which is no file's any more.
    """
    tensors = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.is_contiguous()]
    files = _mapped_files() if tensors else []
    if not files:
        return
    page, libc, starts = mmap.PAGESIZE, ctypes.CDLL(None), [start for start, _ in files]
    for tensor in tensors:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        place = bisect_right(starts, begin) - 1
        if place < 0 or end > files[place][1]:
            continue
        begin, end = -(-begin // page) * page, end // page * page  # at the ends others may have their share of a page
        if begin < end and _of_file(begin // page, end // page):
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _of_file(begin: int, end: int) -> bool:
    """Whether the file's own are all pages [begin, end) of this process that are in memory."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(8 * begin)
            entries = np.frombuffer(pagemap.read(8 * (end - begin)), dtype=np.uint64)
    except OSError:
        return False
    there = entries & np.uint64(_PRESENT | _SWAPPED) != 0
    return len(entries) == end - begin and bool((entries[there] & np.uint64(_OF_FILE) != 0).all())


def _mapped_files() -> list[tuple[int, int]]:
    """Where this process has files mapped, in order; nothing where the system does not say."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    fields = [line.split(None, 5) for line in lines]
    ranges = [field[0].split("-") for field in fields if len(field) == 6 and field[4] != "0"]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]
