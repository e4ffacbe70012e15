"""What stands in `weight.grad` while an optimizer holds that weight's gradient as factors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class HeldGradient(Tensor):
    """A gradient that has a shape and no numbers: `LatentKVAdamW` never makes them.

    It lets torch's own ways with gradients be seen: setting ``weight.grad`` to None or zeroing it (``module.zero_grad()``)
    forgets the factors. Whatever would read or write numbers (`clip_grad_norm_`, a GradScaler, another optimizer, plain
    autograd adding its share) raises RuntimeError instead of leaving this weight out unsaid.

    Args:
        weight: whose gradient it is.
        forget: a bound method, called when it is zeroed; its owner is not kept alive.
    """

    _forget: weakref.WeakMethod

    @staticmethod
    def __new__(cls, weight: Tensor, forget: Callable[[], None]) -> HeldGradient:
        made = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        made._forget = weakref.WeakMethod(forget)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func is torch.ops.aten.zero_.default:
            forget = args[0]._forget()
            if forget is not None:
                forget()
            return args[0]
        raise RuntimeError(
            f"{func} needs the numbers of a gradient that LatentKVAdamW holds as factors only: take its norm from norm_sq() "
            "and clip by step(clip=...). A GradScaler, clip_grad_norm_ or a second optimizer cannot have this weight: keep "
            "it out of what they are given, or train it with latent_kv and torch.optim.AdamW"
        )

    def __deepcopy__(self, memo: dict) -> None:
        """A copied weight has no gradient; a copied optimizer puts its own."""

    def __repr__(self, **_: Any) -> str:
        return f"HeldGradient({tuple(self.shape)}, {self.dtype}, on {self.device})"
