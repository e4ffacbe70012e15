"""How decoding uses row_product and the attention between its products, for comparing ways with one another."""

from __future__ import annotations

import os

import torch

#: How decoding uses it (LMVAE_ROW_PRODUCT): kernels that begin before the one before them ends, that wait, or not at all.
WAYS = ("early", "waiting", "off")


def _way() -> str:
    name = os.environ.get("LMVAE_ROW_PRODUCT") or "early"
    if name not in WAYS:
        raise ValueError(f"LMVAE_ROW_PRODUCT={name!r} is not one of {', '.join(WAYS)}")
    return name


WAY = _way()


def begins_early(device: torch.device) -> bool:
    """Whether kernels of a decoding step are launched as dependents of the one before them: on cards that know such launches
    (sm_90 on), unless the environment says otherwise."""
    return device.type == "cuda" and WAY == "early" and torch.cuda.get_device_capability(device) >= (9, 0)
