"""Memory and disk: what is there, and an error instead of the end where memory is not enough."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from lmvae_fast.errors import MemoryLimitError

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
