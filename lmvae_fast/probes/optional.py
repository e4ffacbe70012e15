"""Packages that only probes need, and the extra that installs them."""

from __future__ import annotations

from types import ModuleType

from lmvae_fast import optional


def require(module: str, purpose: str, extra: str = "probes") -> ModuleType:
    """The module, imported; see :func:`lmvae_fast.optional.require`."""
    return optional.require(module, purpose=purpose, extra=extra)
