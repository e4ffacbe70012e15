"""What a flow is fitted to: posteriors computed once and kept on disk, and refused where they say nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from lmvae_fast.errors import DataError
from lmvae_fast.models.objective import kl_per_dim
from lmvae_fast.models.posterior import Posterior
from lmvae_fast.models.systems.invertible_cvae import InvertibleCVAE
from lmvae_fast.training.feature_cache import TensorCache, content_key, tokenizer_fingerprint
from lmvae_fast.training.validation import ACTIVE_UNIT_VARIANCE


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
    """Raise DataError when no dimension's mean varies from gloss to gloss: the base densities are then all the prior."""
    variance = posterior.mu.double().var(0) if len(posterior.mu) > 1 else torch.zeros(posterior.mu.shape[1])
    if not (variance >= ACTIVE_UNIT_VARIANCE).any():
        kl = float(kl_per_dim(posterior.mu, posterior.logvar).sum(1).mean())
        raise DataError(
            "the VAE has collapsed: its posteriors of these glosses are all one density, so a flow would learn nothing of them",
            value=f"0 of {posterior.mu.shape[1]} units active, KL {kl:.3g} nats, largest variance of a mean "
            f"{float(variance.max()):.2g}",
            limit=f"a variance >= {ACTIVE_UNIT_VARIANCE} in some dimension",
            remedy="train the VAE with a KL threshold or a cyclical beta, and check its active units with `lmvae-fast eval`",
        )
