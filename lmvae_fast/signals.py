"""Signals that ask a long run to end: it does so in order, with everything saved that it has done."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

# SIGHUP: the terminal is gone. Windows has none.
HANGUP: tuple[signal.Signals, ...] = tuple(getattr(signal, name) for name in ("SIGHUP",) if hasattr(signal, name))


#: Signals that end a run in order unless others are given.
USUAL = (signal.SIGINT, signal.SIGTERM, *HANGUP)


class StopSignals:
    """Within the `with` block the first of some signals only sets `received`; the loop then ends in order.

    A second Ctrl-C raises KeyboardInterrupt at once, for who cannot wait. A hangup that is ignored (nohup) stays ignored.
    Outside the main thread Python has no signal handlers, so the object does nothing there.
    """

    def __init__(self, *signals: int) -> None:
        """signals: SIGINT (Ctrl-C), SIGTERM and SIGHUP unless given."""
        self.signals = signals or USUAL
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                if number in HANGUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python and cannot be put back from it
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
