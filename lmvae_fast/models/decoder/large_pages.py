"""Memory for weights that are read from end to end at every step, in pages of 2 MB where the system has them."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

_CHUNK = 32 << 20  # bytes asked for at a time: small weights share large pages


class LargePages:
    """Hands out tensors that lie one after another. With pages of 4 KB a processor spends part of a long read on
    looking up where the pages are; on Linux large ones are asked for, elsewhere this is ordinary memory."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor, which keeps its chunk of memory alive."""
        size = prod(shape) * dtype.itemsize
        taken = -(-size // 64) * 64  # every tensor begins with a cache line
        if taken > self._chunk.numel():
            room = mmap.mmap(-1, -(-max(taken, _CHUNK) // mmap.PAGESIZE) * mmap.PAGESIZE, **_private())
            if hasattr(mmap, "MADV_HUGEPAGE"):
                room.madvise(mmap.MADV_HUGEPAGE)
            self._chunk = torch.frombuffer(room, dtype=torch.uint8)
        out, self._chunk = self._chunk[:size], self._chunk[taken:]
        return out.view(dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor, contiguous."""
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def _private() -> dict[str, int]:
    """Anonymous memory of this process alone: shared memory has other rules for its pages."""
    return {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
