"""Linear maps of a frozen decoder prepared once for both passes of a training step: the product, and its input gradient.

Low-rank adapters (LoRA) beside such a map train: their products are added, and their gradients are given with the inputs'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lmvae_fast.kernels.backend import choose
from lmvae_fast.kernels.packed_linear import PackedLinear, pack_weight, training_product
from lmvae_fast.models.decoder.large_pages import LargePages
from lmvae_fast.models.decoder.packed_products import linear_weight, require

#: Rows that a layout is chosen for: a hint, the same for every batch, so that sums have one order in all runs.
ROWS = 512
Product = Callable[[Tensor, Tensor | None], Tensor]  # rows, and what is added to the result or None


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


class FrozenLinear:
    """``x W^T + b`` over a weight that does not train, or over several with the same inputs, whose outputs then lie side by
    side. On a CPU a second and a third copy of the weight are held, one for each pass; on CUDA one, of several.

    Args:
        parts: linear modules, adapters beside them or not. pages: what the copies are put into where the layout is ours.

    Attributes:
        adapters: what trains beside the weights. weight, bias: ``[outputs, inputs]`` and ``[outputs]`` or None.
    """

    def __init__(self, pages: LargePages, *parts: nn.Module) -> None:
        bases = [without_adapter(part) for part in parts]
        weights = [linear_weight(base) for base in bases]
        biases = [base.bias.detach().to(weights[0].dtype) for base in bases if isinstance(base.bias, Tensor)]
        require(len(biases) in (0, len(bases)), "a bias in some of the projections of one input")
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        bias = torch.cat(biases) if biases else None
        self.weight, self.bias = weight, bias
        #: Whether the product itself adds; where it does not, the norm that follows does (Norm.of_sum).
        self.sums = weight.device.type == "cpu" and choose("frozen_layer", weight) != "triton"
        self.forward = _product(pages, weight, bias) if self.sums else _plain_product(weight, bias)
        self.backward = _product(pages, weight.t(), None) if self.sums else _plain_product(weight.t(), None)
        self.adapters: list[LowRank] = []
        start = 0
        for part, own in zip(parts, weights, strict=True):
            columns, start = slice(start, start + own.shape[0]), start + own.shape[0]
            if is_adapted(part):
                self.adapters.append(_adapter(part, columns))

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """``[T, inputs]`` to ``[T, outputs]``, ``added`` ``[T, outputs]`` to the result before it is rounded."""
        out = self.forward(x, added)
        for adapter in self.adapters:
            adapter.add(x, out)
        return out

    def gradient(self, grad: Tensor, inputs: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """By the inputs ``[T, inputs]``, given that of the outputs ``[T, outputs]``; and by all that trains beside the weights.

        inputs: gives the inputs, which are asked for only where something trains.
        """
        by_x, found = self.backward(grad, None), []
        if self.adapters:
            x = inputs()
            for adapter in self.adapters:
                found += adapter.gradients(grad, x, by_x)
        return by_x, found

    def trained(self) -> list[Tensor]:
        """What trains beside the weights, in the order of its gradients."""
        return [part for adapter in self.adapters for part in (adapter.down, adapter.up)]


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a linear map with peft's adapters beside it."""
    return type(module).__module__.startswith("peft.tuners.lora") and hasattr(module, "base_layer")


def without_adapter(module: Any) -> Any:
    """The linear map that adapters stand beside, or the module itself."""
    return module.base_layer if is_adapted(module) else module


def adapter_state(body: nn.Module) -> tuple:
    """What, if it changes, makes prepared adapters others: all that peft looks at in a pass, but the weights' values."""
    return tuple(_state_of(module) for module in body.modules() if is_adapted(module))


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
    beside = [weight for module in body.modules() if is_adapted(module) for weight in _adapter(module, slice(0))[1:3]]
    known = {id(weight) for weight in beside}
    require(all(id(w) in known for w in body.parameters() if w.requires_grad), "a part of its weights trains")


def _adapter(module: Any, columns: slice) -> LowRank:
    """Peft's one adapter of a module; raises Unlike for more, for other kinds, and for those that are not plainly added."""
    names = list(module.active_adapters)
    require(type(module).__name__ == "Linear" and len(names) == 1, "another kind of adapter, or several")
    (name,) = names
    require(name in module.lora_A, "an adapter that only some of its layers have")
    plain = not (module.disable_adapters or module.merged or name in module.lora_variant or module.lora_bias.get(name))
    dropout = module.lora_dropout[name]
    require(plain and not getattr(dropout, "p", 0.0), "an adapter that is not plainly added")
    down, up = module.lora_A[name].weight, module.lora_B[name].weight
    require(down.requires_grad and up.requires_grad, "an adapter that does not train")
    return LowRank(columns, down, up, float(module.scaling[name]))


def _plain_product(weight: Tensor, bias: Tensor | None) -> Product:
    """torch's own, which on CUDA takes any layout of the weight: nothing is copied."""
    return lambda x, added: linear(x, weight, bias) if added is None else linear(x, weight, bias).add_(added)


def _product(pages: LargePages, weight: Tensor, bias: Tensor | None) -> Product:
    by = training_product(weight.dtype)
    if by == "onednn":
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        plain, summed = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary

        def by_onednn(x: Tensor, added: Tensor | None) -> Tensor:
            if added is None:
                return plain(x, blocked, bias, "none", [], "")
            return summed(x, added, blocked, bias, "add")

        return by_onednn
    if by == "packed":
        return PackedLinear(pages.copy(pack_weight(weight)), bias, out_features=weight.shape[0])
    held = weight if weight.is_contiguous() else weight.t().contiguous().t()
    return lambda x, added: linear(x, held, bias) if added is None else linear(x, held, bias) + added
