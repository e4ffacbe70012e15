"""Functions that modules call for a while in place of their own ``forward``."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

Forward = Callable[..., Any]
Exchanges = list[tuple[nn.Module, Forward]]

_KEY = "_lmvae_fast_exchange"  # among a module's own attributes
_lock = threading.Lock()


class _Active(threading.local):
    """What this thread has exchanged, by the module's id."""

    def __init__(self) -> None:
        self.forwards: dict[int, Forward] = {}


_active = _Active()


@contextmanager
def exchanged(forwards: Exchanges) -> Iterator[None]:
    """Inside, these modules call these functions; afterwards what they called before.

    Other threads, which may decode with other weights from the same modules, call their own meanwhile; exchanges of several
    threads may begin and end in any order.
    """
    for module, _ in forwards:
        _enter(module)
    before, _active.forwards = _active.forwards, _active.forwards | {id(module): call for module, call in forwards}
    try:
        yield
    finally:
        _active.forwards = before
        for module, _ in forwards:
            _leave(module)


def called(module: nn.Module) -> Forward:
    """What this thread's calls of a module go to: what it has exchanged, or the module's own forward, even while other threads
    have something else in its place."""
    return _active.forwards.get(id(module), own_forward(module))


def own_forward(module: nn.Module) -> Forward:
    """A module's own forward, whatever has been exchanged."""
    with _lock:
        return module.__dict__[_KEY].plain if _KEY in module.__dict__ else module.forward


@dataclass
class _Exchanged:
    """What stands behind a module's forward while exchanges last: how many there are, and what was called before the first."""

    users: int
    plain: Forward
    had: bool  # whether that was the module's own attribute, and not its class's


def _enter(module: nn.Module) -> None:
    own = module.__dict__
    with _lock:
        if _KEY not in own:
            plain = module.forward

            @functools.wraps(plain)
            def forward(*args: Any, **options: Any) -> Any:
                return _active.forwards.get(id(module), plain)(*args, **options)

            own[_KEY] = _Exchanged(0, plain, "forward" in own)
            own["forward"] = forward
        own[_KEY].users += 1


def _leave(module: nn.Module) -> None:
    own = module.__dict__
    with _lock:
        state = own[_KEY]
        state.users -= 1
        if state.users == 0:
            del own[_KEY], own["forward"]
            if state.had:
                own["forward"] = state.plain
