"""How decoding uses row_product, for comparing ways with one another."""

from __future__ import annotations

import os

#: How decoding uses it (LMVAE_ROW_PRODUCT): kernels that begin before the one before them ends, that wait, or not at all.
WAYS = ("early", "waiting", "off")


def _way() -> str:
    name = os.environ.get("LMVAE_ROW_PRODUCT") or "early"
    if name not in WAYS:
        raise ValueError(f"LMVAE_ROW_PRODUCT={name!r} is not one of {', '.join(WAYS)}")
    return name


WAY = _way()
