"""Posterior collapse: a latent that says nothing of the sentence, noticed and named."""

from __future__ import annotations

import logging

from lmvae_fast.models.posterior import Posterior

logger = logging.getLogger(__name__)

#: Mean KL of a sentence in nats below which its posterior is as good as the prior.
COLLAPSED_KL = 0.1

REMEDY = (
    "try a lower beta or a slower rise (beta_schedule='cyclical' or 'linear'), kl_mode='free_bits' with kl_target=0.1 to 0.5, "
    "more steps, or a decoder that cannot do without the latent (free_running, fewer trained layers)"
)


def collapsed(kl: float, active_units: float | None = None) -> bool:
    """Whether the latent is not used: a mean KL of next to nothing, or no active dimension."""
    return kl < COLLAPSED_KL or active_units == 0


def warn_of_collapse(kl: float, active_units: float | None, latent_dim: int, where: str) -> bool:
    """Log a warning if the posterior has collapsed; whether it has.

    kl: mean over sentences, nats. active_units: dimensions whose posterior mean varies, or None where they were not counted.
    where: what the figures are of.
    """
    if not collapsed(kl, active_units):
        return False
    units = "" if active_units is None else f", {active_units:.0f} of {latent_dim} dimensions are active"
    logger.warning("%s: the posterior has collapsed (KL %.3g nats%s): %s", where, kl, units, REMEDY)
    return True


def warn_of_prior(posterior: Posterior, where: str) -> bool:
    """The same for the posteriors of a few sentences, whose active units cannot be counted."""
    return warn_of_collapse(float(posterior.kl().mean()), None, posterior.mu.shape[1], where)
