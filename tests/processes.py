"""Waiting for other processes: on what has happened to them, never on a time that a loaded machine may not keep."""

from __future__ import annotations

import time
from pathlib import Path

# Seconds after which what is waited for is held to have failed: no run that works comes near it, however busy the machine.
PATIENCE = 900


def is_running(number: int) -> bool:
    """Whether process ``number`` is neither gone nor a zombie that nobody has asked about yet."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(*numbers: int) -> None:
    """Returns when none of the processes runs any more; AssertionError with those that are left."""
    deadline = time.monotonic() + PATIENCE
    left = list(numbers)
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [number for number in left if is_running(number)]
    assert not left, f"processes were left running: {left}"
