"""Other packages' formats and classes, each in a file of its own; nothing here is imported unless it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = ("cvae", "freia", "langvae", "ray")


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module 'lmvae_fast.integrations' has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
