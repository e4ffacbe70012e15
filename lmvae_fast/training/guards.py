"""What stands between a run and the ways it can end early: signals and figures that are not finite."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from torch import Tensor


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
    """Remembers, on the device, the first micro-batch or step whose figure was NaN or infinite.

    `note` costs a few tiny launches and no synchronisation; `first` reads the record on the host.
    """

    KINDS = ("loss", "gradient norm")

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((len(self.KINDS),), -1, dtype=torch.int64, device=device)

    def note(self, kind: str, value: Tensor, position: int) -> None:
        """Record `position` (any non-negative number that the caller can read back) if `value` is not finite."""
        first = self._first[self.KINDS.index(kind)]
        bad = ~torch.isfinite(value.detach()) & (first < 0)
        first.copy_(torch.where(bad, position, first))

    def first(self) -> tuple[str, int] | None:
        """(kind, position) of the first bad figure, a loss before the gradient norm it spoils; None if all is well."""
        for kind, position in zip(self.KINDS, self._first.tolist(), strict=True):
            if position >= 0:
                return kind, position
        return None
