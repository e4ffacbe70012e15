"""Blocks of FrEIA as one call of coupling_flow that reads their own parameters where they lie.

The op reads one flat tensor. The blocks' parameters become views of one, so that an optimizer's step and a loaded state dict
are seen by it, and its gradient is handed back to them as views: nothing is copied on the way. What takes the parameters
elsewhere (``.to``, ``.double``) is noticed at the next call, which gathers them anew.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmvae_fast.errors import ConfigError
from lmvae_fast.integrations.freia.conversion import Builder
from lmvae_fast.kernels.coupling_flow import FlowParams, FlowSpec, coupling_flow


class Fused:
    """A run of blocks, called with ``(x [B, dim], cond or None, rev)``: y ``[B, dim]`` and logdet ``[B]``."""

    def __init__(self, blocks: Sequence[Any]):
        self.blocks = list(blocks)
        self._built: _Flat | None = None

    def __deepcopy__(self, memo: dict) -> Fused:
        return Fused(
            [copy.deepcopy(block, memo) for block in self.blocks]
        )  # the copies' parameters are views of none yet

    def __reduce__(self) -> Any:
        return Fused, (self.blocks,)

    def __call__(self, x: Tensor, cond: Tensor | None, rev: bool) -> tuple[Tensor, Tensor]:
        if self._built is None or not self._built.current():
            self._built = _Flat(self.blocks)
        flat = self._built
        theta = flat.theta
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in flat.parameters):
            theta = _Gathered.apply(flat, *flat.parameters)
        params = FlowParams(flat.spec, theta, flat.constants, flat.indices)
        return coupling_flow(x, params, cond=cond, inverse=rev)


class _Flat:
    """The flat tensors of some blocks, their trained parameters as views of ``theta``."""

    def __init__(self, blocks: Sequence[Any]):
        builder = Builder(blocks[0].channels)
        for block in blocks:
            builder.where = type(block).__name__
            getattr(builder, f"add_{type(block).__name__}")(block)
        self.spec = FlowSpec(builder.dim, builder.cond_dim, tuple(builder.stages))
        self.slots = self.spec.slots[0]
        self.parameters = [builder.sources[slot.name] for slot in self.slots]
        if len({id(parameter) for parameter in self.parameters}) < len(self.parameters):
            raise ConfigError("subnets share a layer, which coupling_flow cannot express", remedy="build one for each")
        first = self.parameters[0] if self.parameters else blocks[0].perm.new_zeros(0, dtype=torch.float32)
        sizes = self.spec.sizes
        self.theta = torch.empty(sizes[0], dtype=first.dtype, device=first.device)
        self.constants = torch.empty(sizes[1], dtype=first.dtype, device=first.device)
        self.indices = torch.empty(sizes[2], dtype=torch.int32, device=first.device)
        with torch.no_grad():
            for slot, parameter in zip(self.slots, self.parameters, strict=True):
                view = _as_parameter(slot.view(self.theta), parameter)
                view.copy_(parameter)
                parameter.data = view
            for flat, slots in ((self.constants, self.spec.slots[1]), (self.indices, self.spec.slots[2])):
                for slot in slots:
                    slot.view(flat).copy_(builder.values[slot.name])
        fixed = [p for block in blocks for p in block.parameters(recurse=False) if not p.requires_grad]
        trained = {id(parameter) for parameter in self.parameters}
        self.fixed = [p for p in fixed if id(p) not in trained]  # permutations, which were copied
        self.fixed_state = [(p.data_ptr(), p._version) for p in self.fixed]
        self.places = [parameter.data_ptr() for parameter in self.parameters]
        modules = [module for block in blocks for module in block.modules()]
        self.links: list[tuple[Any, str, Any]] = [
            (held, name, value) for m in modules for held in (m._modules, m._parameters) for name, value in held.items()
        ]

    def current(self) -> bool:
        """Whether the blocks still hold the same modules and parameters, these still are the views that were made of them,
        and the permutations those copied."""
        return (
            all(held.get(name) is value for held, name, value in self.links)
            and self.places == [parameter.data_ptr() for parameter in self.parameters]
            and self.fixed_state == [(p.data_ptr(), p._version) for p in self.fixed]
        )


class _Gathered(torch.autograd.Function):
    """theta as a function of the parameters that are its views."""

    @staticmethod
    def forward(ctx: Any, flat: _Flat, *parameters: nn.Parameter) -> Tensor:
        ctx.flat = flat
        return flat.theta.view_as(flat.theta)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        flat = ctx.flat
        return None, *(
            _as_parameter(slot.view(gradient), parameter) if wanted else None
            for slot, parameter, wanted in zip(flat.slots, flat.parameters, needed, strict=True)
        )


def _as_parameter(view: Tensor, parameter: Tensor) -> Tensor:
    """A slot of the flat tensor in a parameter's shape: weights are stored input-major, affine maps without a batch."""
    return view.t() if view.dim() == 2 else view.view(parameter.shape)
