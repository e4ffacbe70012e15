"""The posterior q(z | x): its sample, its KL, and the noise of a batch that several processes share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmvae_fast.kernels.philox import seed_tensor
from lmvae_fast.kernels.posterior import posterior_sample
from lmvae_fast.models.objective import kl_per_dim, kl_reduce
from lmvae_fast.text.batch import Share


@dataclass(frozen=True)
class Posterior:
    """q(z | x) = N(mu, diag(exp(logvar))); both ``[batch, latent_dim]``, float32 (float64 of a float64 model)."""

    mu: Tensor
    logvar: Tensor

    def sample(self, num_samples: int = 1, seed: int | Tensor | None = None) -> Tensor:
        """z ``[batch, latent_dim]``, or ``[num_samples, batch, latent_dim]`` for more than one."""
        return posterior_sample(self.mu, self.logvar, seed=seed, num_samples=num_samples)[0]

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) of each sentence in nats, ``[batch]``."""
        return kl_per_dim(self.mu, self.logvar).sum(-1)


def sample_with_kl(
    posterior: Posterior,
    *,
    kl_mode: str,
    kl_target: float,
    eps: Tensor | None = None,
    seed: int | Tensor | None = None,
    share: Share | None = None,
) -> tuple[Tensor, Tensor]:
    """z ``[batch, latent_dim]`` and the KL term ``[batch]`` of a training step.

    eps: noise of z's shape, for comparisons; drawn from ``seed`` where None. share: what these sentences are of a batch that
    several processes share; each gets the noise of its row in the whole batch.
    """
    if eps is not None:
        kl = kl_reduce(kl_per_dim(posterior.mu, posterior.logvar), kl_mode, kl_target)
        return posterior.mu + eps * torch.exp(0.5 * posterior.logvar), kl
    if share is None:
        return posterior_sample(posterior.mu, posterior.logvar, seed=seed, kl=kl_mode, kl_target=kl_target)
    mu, logvar, places = _in_whole_batch(posterior, share)
    z, kl = posterior_sample(mu, logvar, seed=seed, kl=kl_mode, kl_target=kl_target)
    return z[places], kl[places]


def draw(
    posterior: Posterior,
    samples: int,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    share: Share | None = None,
) -> Tensor:
    """Draws ``[samples, batch, latent_dim]``, differentiable in the posterior.

    noise: ``[batch, latent_dim, samples]``, for comparisons; else from ``seed``, as in :func:`sample_with_kl`.
    """
    if noise is not None:
        sigma = torch.exp(0.5 * posterior.logvar)
        return (posterior.mu.unsqueeze(-1) + sigma.unsqueeze(-1) * noise.to(sigma)).movedim(-1, 0)
    if share is None:
        z = posterior_sample(posterior.mu, posterior.logvar, seed=seed, num_samples=samples)[0]
        return z.view(samples, *posterior.mu.shape)
    mu, logvar, places = _in_whole_batch(posterior, share)
    z = posterior_sample(mu, logvar, seed=seed, num_samples=samples)[0]
    return z.view(samples, *mu.shape)[:, places]


def _in_whole_batch(posterior: Posterior, share: Share) -> tuple[Tensor, Tensor, Tensor]:
    """mu and logvar of the whole batch, and the places of these sentences in it: noise goes by row, so each sentence stands in
    its own; the other rows are idle."""
    places = torch.tensor(list(share.rows), device=posterior.mu.device)
    mu, logvar = (
        x.new_zeros(share.total, x.shape[1]).index_copy(0, places, x) for x in (posterior.mu, posterior.logvar)
    )
    return mu, logvar, places


def shared_seed(share: Share | None, seed: int | Tensor | None, device: torch.device) -> int | Tensor | None:
    """The seed of the memory's dropout; processes that share a batch say which of its sentences they have, so that the
    masks are those of the whole batch."""
    if share is None or share.bounds is not None:  # what shares groups has no dropout there
        return seed
    places = torch.tensor([share.rows[0], share.step, share.total], device=device)
    return torch.cat([seed_tensor(seed, device), places])
