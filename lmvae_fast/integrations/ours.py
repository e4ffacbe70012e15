"""What the integrations that wrap a model of ours have in common: whether it is one."""

from __future__ import annotations

from typing import Any

from lmvae_fast.errors import ConfigError
from lmvae_fast.models.lmvae import LMVAE


def checked_lmvae(model: Any, what: str) -> LMVAE:
    """The model, if it is an ``LMVAE``. what: takes it, as the subject of the message.

    Raises ConfigError for anything else: another library's model, or one that wraps an ``LMVAE`` already.
    """
    if isinstance(model, LMVAE):
        return model
    kind = type(model)
    wraps = kind.__module__.startswith("lmvae_fast.integrations.")
    raise ConfigError(
        f"{what} takes an LMVAE", value=f"{kind.__module__}.{kind.__qualname__}", limit="lmvae_fast.LMVAE",
        remedy="pass its .lmvae" if wraps else "build one with lmvae_fast.LMVAE, or load one with LMVAE.from_pretrained",
    )  # fmt: skip
