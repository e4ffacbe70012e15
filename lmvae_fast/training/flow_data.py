"""What a flow is fitted to and judged by: posteriors kept on disk, refused where they say nothing; its NLL of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from lmvae_fast.errors import DataError
from lmvae_fast.evaluation.collapse import COLLAPSED_KL, REMEDY, collapsed
from lmvae_fast.evaluation.metrics import active_units
from lmvae_fast.models.posterior import Posterior
from lmvae_fast.models.systems.invertible_cvae import BaseDensity, FlowPairs, InvertibleCVAE
from lmvae_fast.models.vae_identity import vae_settings
from lmvae_fast.training.feature_cache import TensorCache, check_rows, content_key, tokenizer_fingerprint

#: Pairs evaluated at a time.
_EVALUATED = 4096


def cached_posteriors(model: InvertibleCVAE, glosses: list[str], cache: TensorCache, vae: str) -> Posterior:
    """The posteriors of glosses under a VAE of this fingerprint, from the cache where they were computed before."""
    tokenizers = [
        tokenizer_fingerprint(part) for part in (model.vae.encoder.tokenizer, model.vae.decoder.tokenizer.tokenizer)
    ]
    key = content_key(glosses=glosses, vae=vae, settings=vae_settings(model.vae), tokenizers=tokenizers)

    def compute() -> dict[str, Tensor]:
        found = model.posteriors(glosses)
        return {"mu": found.mu.contiguous(), "logvar": found.logvar.contiguous()}

    shape = (len(glosses), model.vae.config.latent_dim)
    tensors = cache.get("posteriors", key, compute, lambda found: check_rows(found, {"mu": shape, "logvar": shape}))
    return Posterior(tensors["mu"], tensors["logvar"])


def check_glosses_differ(glosses: list[str]) -> None:
    """Raise DataError for glosses that are one: their posteriors are one density, whatever the VAE."""
    if len(set(glosses)) < 2:
        raise DataError(
            "the glosses do not differ, so a flow would learn one latent for every word",
            value=f"1 distinct gloss in {len(glosses)} definitions", limit="two distinct glosses or more",
            remedy="give more definitions, or choose base='standard'",
        )  # fmt: skip


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


def bridged(model: InvertibleCVAE, vectors: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A flow's input for word vectors; what pads is drawn from torch's generator, or from the one given."""
    bridge = model.set_width(vectors.shape[1])
    noise = None
    if bridge.kind == "pad":
        shape = (len(vectors), bridge.dim_out - bridge.dim_in)
        noise = torch.randn(shape, generator=generator, dtype=model.dtype).to(model.device)
    return bridge(vectors, noise)


def run_flow(
    model: InvertibleCVAE, pairs: FlowPairs, rows: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, BaseDensity]:
    """z ``[rows, dim]`` and logdet ``[rows]`` of some pairs under the flow, and their base densities."""
    conditions = None if pairs.conditions is None else pairs.conditions.index_select(0, rows)
    z, logdet = model.flow(bridged(model, pairs.vectors.index_select(0, rows), generator), conditions)
    return z, logdet, pairs.base.select(rows)


@torch.no_grad()
def flow_figures(model: InvertibleCVAE, pairs: FlowPairs, *, seed: int = 0) -> dict[str, float]:
    """Mean NLL of pairs in nats (``nll``, ``nll_per_dim``) and mean squared distance of T(w) to the base's mean (``mse``).

    The noise that pads goes by the seed: the same at every evaluation.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(2, dtype=torch.float64, device=model.device)
    for start in range(0, len(pairs), _EVALUATED):
        rows = torch.arange(start, min(start + _EVALUATED, len(pairs)), device=model.device)
        z, logdet, base = run_flow(model, pairs, rows, generator)
        total += torch.stack([base.nll(z, logdet).double().sum(), (z - base.mu).double().square().mean(1).sum()])
    nll, mse = (total / max(len(pairs), 1)).tolist()
    return {"nll": nll, "nll_per_dim": nll / model.flow.spec.dim, "mse": mse}
