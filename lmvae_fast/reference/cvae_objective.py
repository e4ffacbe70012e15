"""The objective of the CVAE with G-Skip (IEEE TAI 7(2), 2026; behaviour of zhangjf-nlp/LLM-based-CVAE), term by term.

Every density here carries the public code's constant ``DENSITY_FLOOR`` beside twice the variance, in the prior too; with
it a figure is the public code's, without it (``floor=0``) it is the plain normal density.
All figures are in nats. N posteriors of one prompt, M samples of each, D latent dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmvae_fast.errors import ConfigError

DENSITY_FLOOR = 1e-4
FREE_BITS = 0.5

# Penalty name of the public code -> (its kind, the weight it has by itself).
PENALTIES = {
    "Vanilla": ("kl", 1.0),
    "AE": ("none", 0.0),
    "Beta-VAE": ("kl", 0.1),
    "Beta01-VAE": ("kl", 0.1),
    "Beta02-VAE": ("kl", 0.2),
    "Beta05-VAE": ("kl", 0.5),
    "FB-VAE": ("free_bits", 1.0),
    "Anneal": ("kl", 1.0),
    "Anneal2": ("kl", 1.0),
    "Anneal_": ("kl", 1.0),
    "Optimus": ("free_bits", 1.0),
    "Optimus_": ("free_bits", 1.0),
    "DG-VAE": ("density_gap", 1.0),
    "EMB-VAE": ("kl", 1.0),
    "EMB-DG-VAE": ("density_gap", 1.0),
    "BOW-VAE": ("kl", 1.0),
}
# Where an annealed penalty's weight begins to rise and where it is 1, as shares of the training part of a cycle.
RAMPS = {
    "Anneal": (0.0, 0.5),
    "Anneal2": (0.5, 0.75),
    "Anneal_": (0.5, 0.75),
    "Optimus": (0.5, 0.75),
    "Optimus_": (0.5, 0.75),
}


def log_density(z: Tensor, mu: Tensor, logvar: Tensor, floor: float = DENSITY_FLOOR) -> Tensor:
    """log N(z; mu, exp(logvar)) per dimension, with ``floor`` added to twice the variance; shapes broadcast."""
    return -0.5 * math.log(2 * math.pi) - 0.5 * logvar - (z - mu).square() / (2 * logvar.exp() + floor)


def sample(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """mu + sigma * noise for noise [B, D, n], as [B, n, D]."""
    return (mu.unsqueeze(-1) + torch.exp(0.5 * logvar).unsqueeze(-1) * noise).transpose(1, 2)


def density_gap(mu: Tensor, logvar: Tensor, noise: Tensor, floor: float = DENSITY_FLOOR) -> Tensor:
    """DG-KL: KL of the aggregate of a prompt's posteriors to N(0, I), per dimension and summed; a scalar.

    mu, logvar [N, D]; noise [N, D, M]. Nothing is detached: the gradient also runs through the samples.
    """
    z = sample(mu, logvar, noise).flatten(0, 1)  # [N M, D]
    mixture = torch.logsumexp(log_density(z[:, None], mu[None], logvar[None], floor), dim=1) - math.log(len(mu))
    prior = log_density(z, torch.zeros_like(z), torch.zeros_like(z), floor)
    return (mixture - prior).sum(1).mean()


def mutual_information(
    mu: Tensor, logvar: Tensor, noise: Tensor, *, joint: bool = True, floor: float = DENSITY_FLOOR
) -> Tensor:
    """Mutual information of z and which of the N posteriors it came from; a scalar.

    joint: densities summed over dimensions before the aggregate; else one aggregate per dimension, summed after.
    """
    z = sample(mu, logvar, noise)  # [N, M, D]
    own = log_density(z, mu[:, None], logvar[:, None], floor)
    each = log_density(z[:, :, None], mu, logvar, floor)  # [N, M, N, D]
    if joint:
        own, each = own.sum(-1), each.sum(-1)
    gap = own - torch.logsumexp(each, dim=2) + math.log(len(mu))
    return (gap if joint else gap.sum(-1)).mean()


def kl_per_dim(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL of every posterior and dimension to N(0, 1), [N, D]."""
    return 0.5 * (mu.square() + logvar.exp() - logvar - 1)


def penalty(name: str, mu: Tensor, logvar: Tensor, noise: Tensor | None = None, *, weight: float = 1.0) -> Tensor:
    """The penalty that the public code calls ``name``; a scalar, mean over the N posteriors.

    Args:
        noise: [N, D, M] of the density gap; drawn (M 16) when None.
        weight: w of the annealed penalties, see :func:`anneal_weight`; others ignore it.
    Raises:
        ConfigError: unknown name.
    """
    if name not in PENALTIES:
        raise ConfigError("unknown penalty", value=name, limit=", ".join(PENALTIES))
    kind, own_weight = PENALTIES[name]
    weight = own_weight * (weight if name in RAMPS else 1.0)
    if kind == "none":
        return mu.new_zeros(())
    if kind == "density_gap":
        noise = torch.randn(*mu.shape, 16, dtype=mu.dtype, device=mu.device) if noise is None else noise
        return weight * density_gap(mu, logvar, noise)
    per_dim = kl_per_dim(mu, logvar)
    if kind == "free_bits":
        per_dim = per_dim.clamp(min=FREE_BITS)
    return weight * per_dim.sum(1).mean()


def anneal_weight(calls: int, *, rise: float, full: float, train: int, evaluation: int) -> float:
    """w as the public code counts it.

    Args:
        calls: forward calls so far, evaluation included, this one too: it starts at 1.
        rise, full: shares of the training part where w leaves 0 and reaches 1.
        train, evaluation: calls of either kind in one cycle, which is taken to begin with evaluation at w = 1.
    """
    phase = calls % (train + evaluation)
    if phase <= evaluation:
        return 1.0
    return min(max(((phase - evaluation) / train - rise) / (full - rise), 0.0), 1.0)
