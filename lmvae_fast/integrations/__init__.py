"""Other packages' formats and classes, each in a module of its own.

``lf.integrations.langvae``, ``.freia``, ``.hub``, ``.sentence_transformers``, ``.pythae``, ``.cvae``, ``.optimus`` and ``.ray``
are imported when they are first used; what they need beside this package is asked for by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmvae_fast import lazy

if TYPE_CHECKING:
    from types import ModuleType

    from lmvae_fast.integrations import cvae, freia, hub, langvae, optimus, pythae, ray, sentence_transformers

__all__ = ["cvae", "freia", "hub", "langvae", "optimus", "pythae", "ray", "sentence_transformers"]


def __getattr__(name: str) -> ModuleType:
    return lazy.submodule(__name__, name)


def __dir__() -> list[str]:
    return sorted(__all__)
