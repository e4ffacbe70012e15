"""What a flow of words is fitted to: the base density of every pair, and the pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class BaseDensity:
    """Diagonal Gaussians, one per row: what a flow's output is to be distributed as.

    Attributes:
        mu: means ``[N, dim]``. inv_sigma: one over standard deviations ``[N, dim]``.
        constant: sum log sigma + dim/2 log 2 pi, ``[N]``.
    """

    mu: Tensor
    inv_sigma: Tensor
    constant: Tensor

    @classmethod
    def gaussian(cls, mu: Tensor, logvar: Tensor) -> BaseDensity:
        """N(mu, exp(logvar))."""
        constant = 0.5 * logvar.sum(1) + 0.5 * mu.shape[1] * math.log(2 * math.pi)
        return cls(mu, torch.exp(-0.5 * logvar), constant)

    def select(self, rows: Tensor) -> BaseDensity:
        """The densities of some rows."""
        return BaseDensity(*(part.index_select(0, rows) for part in (self.mu, self.inv_sigma, self.constant)))

    def nll(self, z: Tensor, logdet: Tensor) -> Tensor:
        """-log density of the flow's inputs, nats ``[N]``, where it made z ``[N, dim]`` of them with logdet ``[N]``."""
        return 0.5 * ((z - self.mu) * self.inv_sigma).square().sum(1) + self.constant - logdet

    def mean_nll(self, z: Tensor, logdet: Tensor) -> Tensor:
        """The mean of `nll`, with its gradient written out: by z it is (z - mu) / sigma^2 / N, by logdet -1 / N."""
        return _MeanNLL.apply(z, logdet, self.mu, self.inv_sigma, self.constant)


class _MeanNLL(torch.autograd.Function):
    """See BaseDensity.mean_nll. A dozen passes over [N, dim] between two kernels of a step would be a hundredth of it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, logdet: Tensor, mu: Tensor, inv_sigma: Tensor, constant: Tensor) -> Tensor:
        apart = (z - mu).mul_(inv_sigma)
        flat = apart.flatten()
        ctx.save_for_backward(apart, inv_sigma)
        return (0.5 * flat.dot(flat) + (constant - logdet).sum()) / len(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        apart, inv_sigma = ctx.saved_tensors
        grad = grad / len(apart)
        return (apart * inv_sigma).mul_(grad), (-grad).expand(len(apart)), None, None, None


@dataclass(frozen=True)
class FlowPairs:
    """Word vectors with the base density each is to have; what a flow is fitted to.

    Attributes:
        vectors: ``[N, width]``. base: of N rows. conditions: ``[N, labels]`` or None.
    """

    vectors: Tensor
    base: BaseDensity
    conditions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a fingerprint."""
        named = {"vectors": self.vectors, "mu": self.base.mu, "inv_sigma": self.base.inv_sigma}
        return named if self.conditions is None else {**named, "conditions": self.conditions}

    def to(self, device: torch.device, dtype: torch.dtype) -> FlowPairs:
        """The pairs there and so."""
        base = BaseDensity(*(x.to(device, dtype) for x in (self.base.mu, self.base.inv_sigma, self.base.constant)))
        conditions = None if self.conditions is None else self.conditions.to(device, dtype)
        return FlowPairs(self.vectors.to(device, dtype), base, conditions)
