"""Modules of a package as its attributes, imported when they are first asked for (PEP 562)."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


def submodule(package: str, name: str) -> ModuleType:
    """The module ``name`` of ``package``, imported now; what a package's ``__getattr__`` returns.

    Raises:
        AttributeError: the package has no such module. Errors of a module that is there are its own.
    """
    # Names with an underscore are asked for by tools that look at any module (inspect, pickle, doctest).
    if name.startswith("_") or importlib.util.find_spec(f"{package}.{name}") is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(f"{package}.{name}")
