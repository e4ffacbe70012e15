"""Weights of linear modules as matrices ``[outputs, inputs]``, and what is no such thing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D


class Unlike(ValueError):
    """A model that is not what is written out; the message says where."""


def require(holds: bool, what: str) -> None:
    """Raises Unlike with ``what`` unless it holds."""
    if not holds:
        raise Unlike(what)


def linear_weight(module: nn.Module) -> Tensor:
    """Weight of an nn.Linear or Conv1D as ``[outputs, inputs]``; raises Unlike for a quantised one and for other modules."""
    require(isinstance(module, (nn.Linear, Conv1D)), f"{type(module).__name__} in place of a linear map")
    weight: Any = getattr(module, "weight", None)
    require(_plain(weight), f"{type(module).__name__} over a weight of kind {type(weight).__name__}")
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().t()


def plain_linears(model: nn.Module) -> list[Linear]:
    """Linear modules whose weight is a matrix of floating numbers, rather than what a quantiser puts in its place."""
    found = [module for module in model.modules() if isinstance(module, Linear) and type(module) in (nn.Linear, Conv1D)]
    return [module for module in found if _plain(module.weight)]


def _plain(weight: Any) -> bool:
    # torchao's weights are tensors of a kind of their own that say they are float32.
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
