"""Low-rank adapters (LoRA, as peft puts them beside a linear map) in layers that are written out: added, or merged.

A training step adds their products to those of the frozen maps and gives their gradients (frozen_products.py). Decoding, in
which nothing trains, reads copies of the weights anyhow: adapters are added to these.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmvae_fast.models.decoder.linear_weights import linear_weight, require
from lmvae_fast.models.decoder.walk import modules_of


class LowRank(NamedTuple):
    """An adapter: ``scale * up(down(x))`` is added to some columns of a map's outputs. It trains."""

    columns: slice
    down: Tensor  # [rank, inputs]
    up: Tensor  # [outputs, rank]
    scale: float

    def add(self, x: Tensor, out: Tensor) -> None:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        out[:, self.columns].addmm_(x @ down.t(), up.t(), alpha=self.scale)

    def gradients(self, grad: Tensor, x: Tensor, by_x: Tensor) -> list[Tensor]:
        """By ``down`` and ``up``; what comes to x through the adapter is added to ``by_x``."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        grad = grad[:, self.columns]
        inner = self.scale * (grad @ up)
        by_x.addmm_(inner, down)
        return [(inner.t() @ x).to(self.down.dtype), (self.scale * (grad.t() @ (x @ down.t()))).to(self.up.dtype)]


def merged(weight: Tensor, adapters: list[LowRank]) -> Tensor:
    """A weight ``[outputs, inputs]`` with what stands beside it added; itself where nothing does.

    Raises Unlike for adapters beside half weights: what is less than half of such a weight's last digit would be gone.
    """
    if not adapters:
        return weight
    require(weight.dtype in (torch.float32, torch.float64), f"adapters beside weights in {weight.dtype}")
    weight = weight.clone()
    for columns, down, up, scale in adapters:
        weight[columns].addmm_(up.detach().to(weight), down.detach().to(weight), alpha=scale)
    return weight


def effective_weight(module: nn.Module) -> Tensor:
    """The weight of a linear map, the adapter beside it included, ``[outputs, inputs]``; raises Unlike as `linear_weight` and
    `adapter_of`."""
    weight = linear_weight(without_adapter(module))
    return merged(weight, [adapter_of(module, slice(None))] if is_adapted(module) else [])


def adapter_weights(body: nn.Module) -> list[Tensor]:
    """All that adapters in a body hold."""
    return [weight.detach() for name, weight in body.named_parameters() if ".lora_" in name]


def same_values(now: list[Tensor], then: list[Tensor]) -> bool:
    """Whether tensors of the same shapes hold the same numbers: NaN is unlike all. On CUDA the host waits once."""
    if not now or now[0].device.type == "cpu":
        return all(map(torch.equal, now, then))
    return not torch.stack(torch._foreach_norm(torch._foreach_sub(now, then), torch.inf)).any()


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a linear map with peft's adapters beside it."""
    return type(module).__module__.startswith("peft.tuners.lora") and hasattr(module, "base_layer")


def without_adapter(module: Any) -> Any:
    """The linear map that adapters stand beside, or the module itself."""
    return module.base_layer if is_adapted(module) else module


def adapter_state(body: nn.Module) -> tuple:
    """What, if it changes, makes prepared adapters others: all that peft looks at in a pass, but the weights' values."""
    return tuple(_state_of(module) for module in modules_of(body) if is_adapted(module))


def _state_of(module: Any) -> tuple:
    # At every pass, of a few hundred modules: no walk over what lies below them.
    return (
        tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters),
        *((name, float(scale)) for name, scale in module.scaling.items()),
        *((name, getattr(dropout, "p", 0.0)) for name, dropout in module.lora_dropout.items()),
        *((name, id(part.weight), part.weight.requires_grad)
          for half in (module.lora_A, module.lora_B) for name, part in half.items()),
    )  # fmt: skip


def require_adapters(body: nn.Module) -> None:
    """Raises Unlike unless all that trains in a body is an adapter beside a linear map."""
    beside = [weight for module in body.modules() if is_adapted(module) for weight in adapter_of(module, slice(0))[1:3]]
    require(all(weight.requires_grad for weight in beside), "an adapter that does not train")
    known = {id(weight) for weight in beside}
    require(all(id(w) in known for w in body.parameters() if w.requires_grad), "a part of its weights trains")


def adapter_of(module: Any, columns: slice) -> LowRank:
    """Peft's one adapter of a module; raises Unlike for more, for other kinds, and for those that are not plainly added."""
    names = list(module.active_adapters)
    require(type(module).__name__ == "Linear" and len(names) == 1, "another kind of adapter, or several")
    (name,) = names
    require(name in module.lora_A, "an adapter that only some of its layers have")
    plain = not (module.disable_adapters or module.merged or name in module.lora_variant or module.lora_bias.get(name))
    dropout = module.lora_dropout[name]
    drops = dropout.training and getattr(dropout, "p", 0.0)
    require(plain and not drops, "an adapter that is not plainly added")
    down, up = module.lora_A[name].weight, module.lora_B[name].weight
    return LowRank(columns, down, up, float(module.scaling[name]))
