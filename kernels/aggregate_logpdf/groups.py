"""Group ids in any order, turned into the sorted order and offsets that the backends take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sorted(NamedTuple):
    """Rows of z and posteriors in the order of their groups: `z_order` [K] and `order` [N] (int64) are the places they come
    from, `z_place` [K] says where each row of z went; `cu_z` and `cu_posteriors` int32 [N + 2] are the groups' offsets."""

    z_order: Tensor
    z_place: Tensor
    order: Tensor
    cu_z: Tensor
    cu_posteriors: Tensor


def sort_by_group(z_ids: Tensor, posterior_ids: Tensor) -> Sorted:
    """Stable on both sides and free of host synchronisation: of N + 1 groups all but those that exist are empty.

    Rows of z whose id no posterior has are put into group N, which has no posterior.
    """
    count = posterior_ids.shape[0]
    ids, order = torch.sort(posterior_ids, stable=True)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[1:] = ids[1:] != ids[:-1]
    number = starts.cumsum(0) - 1  # groups counted from 0 in the order of their ids
    if count:
        place = torch.searchsorted(ids, z_ids.to(ids.dtype)).clamp_max(count - 1)
        z_number = torch.where(ids[place] == z_ids, number[place], count)
    else:
        z_number = torch.zeros_like(z_ids, dtype=torch.int64)
    z_number, z_order = torch.sort(z_number, stable=True)
    bounds = torch.arange(count + 2, device=ids.device)
    return Sorted(
        z_order,
        torch.argsort(z_order),
        order,
        torch.searchsorted(z_number, bounds, out_int32=True),
        torch.searchsorted(number, bounds, out_int32=True),
    )
