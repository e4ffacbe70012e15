"""The draws of one training step: what goes into the memory, the embedding and the residual, and the KL beside them.

Every part draws noise of its own from one seed, so that adding a part changes no other's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.errors import ConfigError, LatentError
from lmvae_fast.models.aggregate import dg_kl
from lmvae_fast.models.objective import kl_mode_at
from lmvae_fast.models.posterior import Posterior, draw, sample_with_kl
from lmvae_fast.models.prompt_objective import aggregate_groups
from lmvae_fast.text.batch import Batch

#: Noise given for comparisons: of z ``[B, latent_dim]``, or by part ``[B, latent_dim, n]``: ``z``, ``emb`` (the embedding's
#: own latent), ``skip`` (the residual's draws), ``kl`` (the density gap's), ``bow`` (a draw for each place of a row) and
#: ``tokens`` (token dropout's, ``[B, max_len]``).
Noise = Tensor | Mapping[str, Tensor]
Seed = int | Tensor | None

# Streams of one seed; the memory's dropout has a fifth.
STREAMS = {
    "z": 0, "emb": 0x2545F491, "skip": 0x4F6CDD1D, "kl": 0x14057B7E, "bow": 0x6C078965, "dropout": 0x5DEECE66D,
    "tokens": 0x27BB2EE6,
}  # fmt: skip


class Latents(NamedTuple):
    """z ``[B, latent_dim]``; the KL term ``[B]``; and where the model has the part: the embedding's own latent ``[B,
    latent_dim]`` and the residual's draws ``[B, samples, latent_dim]``."""

    z: Tensor
    kl: Tensor
    shift: Tensor | None
    residual: Tensor | None


def stream(seed: Seed, name: str, turn: int = 0) -> Seed:
    """The seed of one part's noise; ``turn`` counts repetitions within a step. None stays None: torch's generator."""
    offset = STREAMS[name] ^ (turn << 40)
    if seed is None or offset == 0:
        return seed
    return torch.cat([seed[:1] ^ offset, seed[1:]]) if isinstance(seed, Tensor) else seed ^ offset


def noise_of(noise: Noise | None, name: str, batch: int) -> Tensor | None:
    """The noise that was given for a part, ``[B, latent_dim, n]``, or None. Raises LatentError for another batch."""
    if noise is None or isinstance(noise, Tensor):
        found = noise if name == "z" else None
    else:
        found = noise.get(name)
    if found is None:
        return None
    if found.dim() not in (2, 3) or found.shape[0] != batch:
        raise LatentError(
            f"the noise {name!r} does not fit the batch", value=list(found.shape), limit=f"[{batch}, ...]"
        )
    return found.unsqueeze(-1) if found.dim() == 2 else found


def draw_latents(
    config: LMVAEConfig, posterior: Posterior, batch: Batch, *, beta: float | Tensor, noise: Noise | None, seed: Seed,
    turn: int = 0,
) -> Latents:  # fmt: skip
    """What a step draws from a batch's posteriors. noise: instead of drawing; seed, turn: see :func:`stream`; a later turn has
    no KL."""
    size = posterior.mu.shape[0]
    if config.prompted and batch.share is not None and batch.share.bounds is None:
        raise ConfigError(
            "the responses of a prompt are split over processes", value=f"{batch.share.step} processes",
            limit="whole groups on each", remedy="give Share the bounds of the batch's groups",
        )  # fmt: skip

    def samples(name: str, count: int) -> Tensor:
        given = noise_of(noise, name, size)
        return draw(posterior, count, noise=given, seed=stream(seed, name, turn), share=batch.share)

    if turn:
        z, kl = samples("z", 1)[0], posterior.mu.new_zeros(size)
    elif config.kl_mode == "density_gap":
        z = samples("z", 1)[0]
        kl = dg_kl(
            samples("kl", config.kl_samples), posterior.mu, posterior.logvar, min_var=config.density_floor,
            **aggregate_groups(batch),
        )  # fmt: skip
    else:
        given = noise_of(noise, "z", size)
        z, kl = sample_with_kl(
            posterior, kl_mode=kl_mode_at(str(config.kl_mode), beta), kl_target=float(config.kl_target or 0.0),
            eps=None if given is None else given[..., 0], seed=stream(seed, "z", turn), share=batch.share,
        )  # fmt: skip
    shift = samples("emb", 1)[0] if config.embedding_shift and config.shift_kind == "mlp" else None
    residual = None
    wanted = torch.is_grad_enabled() or not str(config.output_residual).startswith("gskip")
    if config.output_residual not in (None, "none") and wanted:
        residual = samples("skip", config.residual_samples).movedim(0, 1)
    return Latents(z, kl, shift, residual)
