"""What a CUDA graph does, on the CPU: a step's operations recorded once and done again over the same tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_HOST = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.lift_fresh.default}


class RecordedOperations(TorchDispatchMode):
    """A step whose Python runs once, here; :meth:`replay` does its operations again, each on the tensors it had.

    Raises RuntimeError where the step reads a value on the host or copies one from it, as a capture would.
    """

    def __init__(self, step, device):
        super().__init__()
        self.calls, self.replays = [], 0
        with self:
            step()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _HOST:
            raise RuntimeError(f"{func} in a recorded step")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()  # what is recorded lies below autograd: backward's own operations too
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for recorded, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(recorded, Tensor) and recorded.data_ptr() != new.data_ptr():
                    recorded.copy_(new)
