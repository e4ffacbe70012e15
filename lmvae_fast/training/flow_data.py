"""What a flow is fitted to: posteriors computed once and kept on disk, and refused where they say nothing."""

from __future__ import annotations

from torch import Tensor

from lmvae_fast.errors import DataError
from lmvae_fast.evaluation.collapse import COLLAPSED_KL, REMEDY, collapsed
from lmvae_fast.evaluation.metrics import active_units
from lmvae_fast.models.posterior import Posterior
from lmvae_fast.models.systems.invertible_cvae import InvertibleCVAE
from lmvae_fast.training.feature_cache import TensorCache, content_key, tokenizer_fingerprint


def cached_posteriors(model: InvertibleCVAE, glosses: list[str], cache: TensorCache, vae: str) -> Posterior:
    """The posteriors of glosses under a VAE of this fingerprint, from the cache where they were computed before."""
    tokenizers = [
        tokenizer_fingerprint(part) for part in (model.vae.encoder.tokenizer, model.vae.decoder.tokenizer.tokenizer)
    ]
    key = content_key(glosses=glosses, vae=vae, tokenizers=tokenizers, max_len=model.vae.config.max_len)

    def compute() -> dict[str, Tensor]:
        found = model.posteriors(glosses)
        return {"mu": found.mu.contiguous(), "logvar": found.logvar.contiguous()}

    tensors = cache.get("posteriors", key, compute)
    return Posterior(tensors["mu"], tensors["logvar"])


def check_not_collapsed(posterior: Posterior) -> None:
    """Raise DataError for posteriors that say nothing of their glosses: the base densities are then all the prior."""
    kl = float(posterior.kl().mean())
    active = active_units(posterior.mu) if len(posterior.mu) > 1 else 0
    if collapsed(kl, active):
        raise DataError(
            "the VAE has collapsed: its posteriors of these glosses are as good as the prior, so a flow would learn nothing",
            value=f"KL {kl:.3g} nats, {active} of {posterior.mu.shape[1]} dimensions active",
            limit=f"a mean KL >= {COLLAPSED_KL} nats and an active dimension", remedy=f"train the VAE anew: {REMEDY}",
        )  # fmt: skip
