"""What stands between a run and the ways it can end early: signals and figures that are not finite."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

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


class StopSignals:
    """Within the `with` block the first SIGINT (Ctrl-C) or SIGTERM only sets `received`; the loop then ends in order.

    A second Ctrl-C raises KeyboardInterrupt at once, for who cannot wait. Outside the main thread Python has no signal
    handlers, so the object does nothing there.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python and cannot be put back from it
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


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
