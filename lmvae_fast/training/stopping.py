"""What stands between a run and figures that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor


class FiniteWatch:
    """Remembers, on the device, the position of the first figure that was NaN or infinite.

    `note` costs a few tiny launches and no synchronisation; `first` reads the record on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=device)

    @property
    def state(self) -> Tensor:
        """What `note` changes, in place: an int64 scalar, -1 while all is well."""
        return self._first

    def note(self, value: Tensor, position: int | Tensor) -> None:
        """Record `position` (>= 0, a number that the caller can read back, or an int64 scalar on the device) if `value` is
        the first that is not finite."""
        bad = ~torch.isfinite(value.detach()) & (self._first < 0)
        self._first.copy_(torch.where(bad, position, self._first))

    def first(self) -> int | None:
        """The position of the first bad figure; None if all is well."""
        position = int(self._first)
        return None if position < 0 else position
