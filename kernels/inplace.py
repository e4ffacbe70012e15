"""What an op that writes into its arguments owes to callers and to autograd: no element written twice, and raised versions."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1024)
def _separate(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether all elements lie in places of their own: sorted by stride, each dimension steps over all that is inside it."""
    if 0 in sizes:
        return True
    reach = 0  # of what the dimensions so far cover, beyond their first element
    for stride, size in sorted((stride, size) for stride, size in zip(strides, sizes, strict=True) if size > 1):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def check_written(**tensors: Tensor) -> None:
    """Raise ValueError, as torch does for its own writes, where elements to be written share a place in memory.

    Within one tensor (an expanded view), or because two of them are one. Looks at sizes, strides and addresses only.
    """
    traced = torch.compiler.is_compiling()
    for name, tensor in tensors.items():
        sizes, strides = tensor.shape, tensor.stride()
        if traced:
            separate = all(stride != 0 or size <= 1 for stride, size in zip(strides, sizes, strict=True))
        else:
            separate = tensor.is_contiguous() or _separate(tuple(sizes), strides)
        if not separate:
            raise ValueError(
                f"{name} is written in place, but several of its elements share one place in memory: it has sizes "
                f"{list(sizes)} and strides {list(strides)}; give a tensor that was not expanded (clone() makes one)"
            )
    if traced or len(tensors) < 2:
        return
    places: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and (other := places.setdefault(tensor.data_ptr(), name)) != name:
            raise ValueError(f"{other} and {name} are written in place, but they are the same memory")


def written(*tensors: Tensor) -> None:
    """Tell autograd that these were changed: a backward that still needs their old values raises, as after torch's writes."""
    if not torch.compiler.is_compiling():  # what a graph changes is noted by whoever traced it
        torch._C._increment_version(tensors)
