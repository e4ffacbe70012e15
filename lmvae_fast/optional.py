"""Packages that only some features need: imported when they are used, asked for by name where they are absent."""

from __future__ import annotations

import importlib
from types import ModuleType

from lmvae_fast.errors import MissingPackageError


def require(module: str, *, purpose: str, extra: str | None = None, package: str | None = None) -> ModuleType:
    """The module, imported.

    Args:
        module: name to import, such as "matplotlib" or "ray.data".
        purpose: what needs it, as the subject of the message: "drawing", "a decoder that trains by LoRA".
        extra: of this package that installs it. package: its own name on PyPI, where no extra does.

    Raises:
        MissingPackageError: it is absent, or cannot be imported; says why, and what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        wanted = f"'lmvae_fast[{extra}]'" if extra else package or module.partition(".")[0]
        raise MissingPackageError(
            f"{purpose} needs {module}, which cannot be imported ({error})", name=module, remedy=f"pip install {wanted}"
        ) from error
