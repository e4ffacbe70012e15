"""Probes: what a latent space holds, how it is laid out, and what is decoded from it.

The metrics are pure functions of arrays, in modules that are imported when they are first used:
``lf.probes.disentanglement``, ``.geometry``, ``.clusters``, ``.projections``, ``.sts``, ``.linguistic``, ``.text``,
``.definition_modelling``, ``.generation_quality``; ``.factors`` makes their factor tables. ``lf.probe`` runs all of them on a
model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmvae_fast import lazy

if TYPE_CHECKING:
    from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    return lazy.submodule(__name__, name)
