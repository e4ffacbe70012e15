"""The call of a decoder's body that is under way, for attention modules that its keyword arguments do not reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor


class Running(NamedTuple):
    """attention: what stands behind the call (an AttentionContext). positions: of its tokens, int64 ``[T]``."""

    attention: Any
    positions: Tensor


_running: ContextVar[Running | None] = ContextVar("lmvae_fast_running", default=None)


def running() -> Running | None:
    """The call under way in this thread, or None outside of one."""
    return _running.get()


@contextmanager
def run_with(attention: Any, positions: Tensor) -> Iterator[None]:
    """Inside, `running` gives these. A body that is computed again in a backward pass (checkpointing) is outside."""
    token = _running.set(Running(attention, positions))
    try:
        yield
    finally:
        _running.reset(token)
