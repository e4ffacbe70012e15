"""What stands between a run and the ways it can end early: memory that runs out and figures that are not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lmvae_fast.errors import MemoryLimitError

_NO_MEMORY = ("can't allocate memory", "out of memory")  # torch's allocators on CPU and CUDA


@contextlib.contextmanager
def memory_guard(what: str, remedy: str, checkpoint: Path | None) -> Iterator[None]:
    """Running out of memory within raises MemoryLimitError: what took it, how much was asked for, which setting helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        message = str(error).strip()
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(m in message for m in _NO_MEMORY):
            raise
        lines = [line for line in message.splitlines() if any(m in line for m in _NO_MEMORY)] or [message]
        raise MemoryLimitError(
            f"out of memory in {what}",
            value=lines[0][:300],
            remedy=f"{remedy}; the last checkpoint is {checkpoint or 'none yet'}: go on from it with resume",
        ) from error


class FiniteWatch:
    """Remembers, on the device, the position of the first figure that was NaN or infinite.

    `note` costs a few tiny launches and no synchronisation; `first` reads the record on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=device)

    def note(self, value: Tensor, position: int) -> None:
        """Record `position` (a number >= 0 that the caller can read back) if `value` is the first that is not finite."""
        bad = ~torch.isfinite(value.detach()) & (self._first < 0)
        self._first = torch.where(bad, position, self._first)

    def first(self) -> int | None:
        """The position of the first bad figure; None if all is well."""
        position = int(self._first)
        return None if position < 0 else position
