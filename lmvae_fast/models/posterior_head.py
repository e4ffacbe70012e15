"""A posterior that tells sentences apart before anything is learnt."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lmvae_fast.errors import DataError

#: Standard deviation of the posterior at its start; the means' is 1.
START_STD = 0.3


class WhitenedHead(nn.Linear):
    """From features to mu and logvar side by side, with a bias; `fit` gives it the start that features of the data say.

    Drawn at random, the means of features of length 1 vary by some hundredths, under noise of deviation 1: hundreds of steps
    go by until a latent says anything about its sentence, and a decoder learns first to do without.

    Args:
        width: of the features. latent_dim: of the latent.
    """

    def __init__(self, width: int, latent_dim: int):
        super().__init__(width, 2 * latent_dim)
        self.latent_dim = latent_dim
        nn.init.zeros_(self.bias)

    @property
    def fitted(self) -> bool:
        """Whether it has its start: the deviation of a head that has none is 1."""
        return bool(self.bias.any())

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Start at features ``[N, width]``: the means are their coordinates along the leading principal directions, each of
        unit variance; logvar is 2 log(START_STD) for all.

        Directions beyond the rank of the features keep their random weights, and a mean of 0 over the data.
        Raises DataError for features of one sentence, or of equal ones, along whose directions nothing varies.
        """
        x = features.to(self.bias.device, torch.float64)
        mean = x.mean(0)
        x = x - mean
        values, directions = torch.linalg.eigh(x.t() @ x / max(len(x), 1))
        values, directions = values.flip(0)[: self.latent_dim], directions.flip(1)[:, : self.latent_dim]
        rank = int((values > values[:1] * 1e-9).sum()) if len(x) else 0
        if not len(x) or not float(values[0]) > 0 or rank == 0:
            raise DataError(
                "the posterior cannot start whitened: the encoder says the same of every sentence",
                value=f"{len(x)} sentences", limit="two different ones",
                remedy="give more data, or set posterior_init='random'",
            )  # fmt: skip
        largest = directions.abs().argmax(0)
        directions = directions * directions.gather(0, largest[None]).sign()  # an eigenvector's sign is arbitrary
        self.weight[:rank] = (directions[:, :rank] / values[:rank].sqrt()).t().to(self.weight.dtype)
        self.weight[self.latent_dim :].zero_()
        self.bias[: self.latent_dim] = -(self.weight[: self.latent_dim].double() @ mean).to(self.bias.dtype)
        self.bias[self.latent_dim :] = 2 * math.log(START_STD)
