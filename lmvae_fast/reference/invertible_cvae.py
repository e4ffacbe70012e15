"""The Invertible CVAE's flow and losses in plain eager torch (arXiv 2312.13208; blocks of arXiv 2305.01713, section 4).

- A block of kind ``coupling``: x_a, x_b = split(x); (log s, t) = m([x_b, c]); y = [s x_a + t, x_b]; then an index
  permutation; then ActNorm. Nothing bounds s.
- ``allinone`` and ``glow``: FrEIA 0.2's AllInOneBlock, and its GLOWCouplingBlock followed by ActNorm and permutation.
- m is an MLP: Linear, activation, ..., Linear.
- Losses in nats, constants included: the flow's NLL of word vectors under a base density of its output.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


def mlp(widths: Sequence[int], activation: str) -> nn.Sequential:
    """Linear layers of these widths with the activation between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


class ReferenceBlock(nn.Module):
    """One block over ``dim`` channels; ``forward(x, c)`` gives y and log|det dy/dx|.

    Args:
        index: int64 ``[dim]``, the permutation y[j] = u[index[j]].
        others: as of CouplingFlow.
    """

    index: Tensor

    def __init__(
        self, kind: str, dim: int, hidden: Sequence[int], index: Tensor, *, cond_dim: int = 0, activation: str = "relu",
        clamp: float = 2.0,
    ):  # fmt: skip
        super().__init__()
        self.kind, self.clamp = kind, clamp
        self.split = dim - dim // 2
        first, second = self.split, dim - self.split
        self.register_buffer("index", index)
        self.raw_scale, self.offset = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        # What transforms the first half reads the second, and the other way round.
        self.of_first = self.of_second = None
        if kind in ("coupling", "glow"):
            self.of_first = mlp([second + cond_dim, *hidden, 2 * first], activation)
        if kind in ("allinone", "glow"):
            self.of_second = mlp([first + cond_dim, *hidden, 2 * second], activation)

    def _log_scale_and_shift(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        raw_scale, shift = raw.chunk(2, dim=1)
        if self.kind == "coupling":
            return raw_scale, shift
        if self.kind == "allinone":
            return self.clamp * torch.tanh(0.1 * raw_scale), 0.1 * shift
        return self.clamp * 0.636 * torch.atan(raw_scale), shift

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x ``[B, dim]``, c ``[B, cond_dim]`` or None -> y ``[B, dim]``, logdet ``[B]``."""
        first, second = x[:, : self.split], x[:, self.split :]
        logdet = x.new_zeros(len(x))
        if self.of_first is not None:
            log_scale, shift = self._log_scale_and_shift(self.of_first(_beside(second, c)))
            first, logdet = first * log_scale.exp() + shift, logdet + log_scale.sum(1)
        if self.of_second is not None:
            log_scale, shift = self._log_scale_and_shift(self.of_second(_beside(first, c)))
            second, logdet = second * log_scale.exp() + shift, logdet + log_scale.sum(1)
        y = torch.cat([first, second], dim=1)
        scale = self.raw_scale.exp()
        if self.kind == "allinone":
            scale = 0.1 * nn.functional.softplus(self.raw_scale, beta=0.5)
        logdet = logdet + scale.log().sum()
        if self.kind == "coupling":
            return y[:, self.index] * scale + self.offset, logdet
        return (y * scale + self.offset)[:, self.index], logdet


def _beside(x: Tensor, c: Tensor | None) -> Tensor:
    return x if c is None else torch.cat([x, c], dim=1)


class ReferenceInvertibleCVAE(nn.Module):
    """T from vectors to latents as a chain of blocks, with the three losses it is fitted by."""

    def __init__(self, blocks: Sequence[ReferenceBlock]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x ``[B, dim]`` -> z ``[B, dim]``, logdet ``[B]``."""
        logdet = x.new_zeros(len(x))
        for block in self.blocks:
            x, more = block(x, c)
            logdet = logdet + more
        return x, logdet

    def posterior_loss(self, x: Tensor, mu: Tensor, sigma: Tensor, c: Tensor | None = None) -> Tensor:
        """mean[ 1/2 ||(T(x) - mu) / sigma||^2 + sum log sigma + dim/2 log 2 pi - logdet ]; mu, sigma ``[B, dim]``."""
        z, logdet = self(x, c)
        square = (((z - mu) / sigma) ** 2).sum(1)
        constant = 0.5 * x.shape[1] * math.log(2 * math.pi)
        return (0.5 * square + sigma.log().sum(1) + constant - logdet).mean()

    def standard_loss(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """The same with the base N(0, I)."""
        return self.posterior_loss(x, torch.zeros_like(x), torch.ones_like(x), c)

    def cluster_loss(self, x: Tensor, centres: Tensor, c: Tensor | None = None, *, variance: float = 0.4) -> Tensor:
        """The same with the base N(centre of the row's cluster ``[B, dim]``, variance): 1 - sigma^2 with sigma^2 = .6."""
        return self.posterior_loss(x, centres, torch.full_like(x, math.sqrt(variance)), c)


def principal_components(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean ``[width]`` and leading directions ``[width, count]`` (orthonormal, signs arbitrary) of vectors ``[N, width]``."""
    mean = vectors.mean(0)
    _, _, directions = torch.linalg.svd(vectors - mean, full_matrices=False)
    return mean, directions[:count].T
