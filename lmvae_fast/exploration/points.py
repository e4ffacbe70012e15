"""Points of latent space that the latent operations start from, and how latents are spread over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.data.dataset import Example
from lmvae_fast.data.prompts import PromptResponse
from lmvae_fast.errors import DataError, LatentError
from lmvae_fast.evaluation.collapse import warn_of_prior
from lmvae_fast.memory import check_memory
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.posterior import Posterior

#: A sentence (with its labels, where the model has them: an Example), a prompt with a response, or a latent ``[latent_dim]``.
Item = str | Example | PromptResponse | Tensor

_HALVINGS = 60  # of a bracket, in float64: no quantile moves any more
_CHUNK = 2**22  # elements of one pass over (posteriors, dimensions, probabilities)


@dataclass(frozen=True)
class Points:
    """Latents to start from.

    ``z`` is ``[N, latent_dim]`` (posterior means of sentences); ``labels`` the pooled labels ``[N, labels]`` of a conditional
    decoder, or None; ``posterior`` what they come from, where all of them are sentences.
    """

    z: Tensor
    labels: Tensor | None
    posterior: Posterior | None


def check_room(model: LMVAE, points: int) -> None:
    """Before points are made and decoded: they fit into memory, with the texts of them. Raises MemoryLimitError."""
    check_memory(f"{points:,} points", "ask for fewer", points * (16 * model.config.latent_dim + 2048))


def locate(model: LMVAE, items: Sequence[Item], annotations: Tensor | None = None) -> Points:
    """The points of some sentences and latents, on the model's device.

    Args:
        model: any LMVAE.
        items: sentences or latents, mixed as you like; all sentences are encoded together, and a posterior that has
            collapsed is logged as a warning.
        annotations: pooled labels of a conditional decoder, ``[labels]`` for all items or ``[N, labels]``. Without them,
            items must be examples with labels.

    Raises:
        LatentError: a latent of another shape, or with NaN or Inf; no labels where the decoder needs them, labels of
            another shape, or labels where it takes none.
        DataError: a sentence without tokens, or without the labels that the encoder reads.
    """
    sentences = [row for row, item in enumerate(items) if not isinstance(item, Tensor)]
    weight = model.posterior_head.weight
    z = torch.empty(len(items), model.config.latent_dim, dtype=weight.dtype, device=weight.device)
    posterior = None
    if sentences:
        posterior = model.encode([items[row] for row in sentences])
        warn_of_prior(posterior, "these sentences")  # a walk between points of the prior says nothing of them
        z[sentences] = posterior.mu
    for row, item in enumerate(items):
        if isinstance(item, Tensor):
            model.check_latents(item.unsqueeze(0) if item.dim() == 1 else item)
            if item.numel() != z.shape[1]:
                raise LatentError(
                    "one latent is wanted", value=list(item.shape), limit=f"[{z.shape[1]}]", remedy="pick a row"
                )
            z[row] = item.view(-1).to(z)
    labels = _labels(model, items, annotations)
    return Points(z, None if labels is None else labels.to(z), posterior if len(sentences) == len(items) else None)


def asked(model: LMVAE, items: Sequence[Item], options: dict[str, Any]) -> dict[str, Any]:
    """Options of ``model.decode`` with the prompt of these items, where the model answers prompts and none was given.

    Raises DataError where the items have no prompt, or different ones.
    """
    if not model.config.prompted or options.get("prompts") is not None:
        return options
    prompts = {item.prompt for item in items if isinstance(item, PromptResponse)}
    if len(prompts) != 1:
        raise DataError(
            "which prompt is to be answered?", value=f"items of {len(prompts)} prompts", limit=1,
            remedy="give prompts=, or responses to one prompt",
        )  # fmt: skip
    return {**options, "prompts": prompts.pop()}


def _labels(model: LMVAE, items: Sequence[Item], annotations: Tensor | None) -> Tensor | None:
    width = len(model.config.annotations)
    if not model.config.conditional_decoder:
        if annotations is not None:
            raise LatentError(
                "this decoder takes no labels", value=list(annotations.shape), remedy="leave annotations out"
            )
        return None
    if annotations is not None:
        if annotations.shape not in ((width,), (len(items), width)) or not bool(torch.isfinite(annotations).all()):
            raise LatentError(
                "pooled labels do not fit",
                value=list(annotations.shape),
                limit=f"finite [{width}] or [{len(items)}, {width}]",
            )
        return annotations.expand(len(items), width)
    latents = [row for row, item in enumerate(items) if isinstance(item, Tensor)]
    if latents:
        raise LatentError(
            "a conditional decoder needs the pooled labels beside a latent", value=f"item {latents[0]}",
            limit=f"annotations [{width}]", remedy="pass annotations, or a sentence with labels",
        )  # fmt: skip
    return model.tokenize(items, on_empty="error").annotations


def aggregate_quantiles(
    aggregate: Posterior | Tensor, probabilities: Sequence[float], dims: Sequence[int] | None = None
) -> Tensor:
    """Quantiles of the aggregate posterior, dimension by dimension: float64 ``[dims, probabilities]`` on the CPU.

    Of a Posterior: of the mixture ``mean_n N(mu_n, exp(logvar_n))``, which is how mu + sigma * noise is spread over the
    sentences; solved from its distribution function, so no noise is drawn. Of latents ``[N, latent_dim]``: of these
    points, linear between neighbours. ``dims`` None takes all.

    Raises LatentError for no points, values that are not finite, or probabilities outside (0, 1).
    """
    mu, logvar = (aggregate.mu, aggregate.logvar) if isinstance(aggregate, Posterior) else (aggregate, None)
    parts = [mu] if logvar is None else [mu, logvar]
    if any(part.dim() != 2 or not part.numel() or not bool(torch.isfinite(part).all()) for part in parts):
        raise LatentError(
            "no aggregate to take quantiles of", value=list(mu.shape), limit="finite [N >= 1, latent_dim]"
        )
    if not probabilities or not all(0.0 < p < 1.0 for p in probabilities):
        raise LatentError("quantiles are taken at probabilities", value=list(probabilities), limit="within (0, 1)")
    chosen = list(range(mu.shape[1])) if dims is None else list(dims)
    mu, p = mu[:, chosen].double().cpu(), torch.tensor(probabilities, dtype=torch.float64)
    if logvar is None:
        return torch.stack([torch.quantile(column, p) for column in mu.unbind(1)])
    sigma = torch.exp(0.5 * logvar[:, chosen].double().cpu())
    width = max(1, _CHUNK // (mu.shape[0] * len(p)))
    pairs = zip(mu.split(width, 1), sigma.split(width, 1), strict=True)
    return torch.cat([_mixture_quantiles(*pair, p) for pair in pairs])


def _mixture_quantiles(mu: Tensor, sigma: Tensor, p: Tensor) -> Tensor:
    """Quantiles ``[dims, probabilities]`` for ``mu``, ``sigma`` ``[N, dims]``."""
    own = mu[..., None] + sigma[..., None] * torch.special.ndtri(p)
    low, high = own.amin(0), own.amax(0)  # the mixture's quantile lies among those of its components
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle - mu[..., None]) / sigma[..., None]).mean(0) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def slerp(start: Tensor, end: Tensor, weights: Tensor) -> Tensor:
    """Points ``[len(weights), latent_dim]`` on the great circle from start to end, their lengths interpolated linearly."""
    lengths = start.norm() + weights * (end.norm() - start.norm())
    a, b = start / start.norm().clamp_min(1e-12), end / end.norm().clamp_min(1e-12)
    angle = torch.acos((a @ b).clamp(-1.0, 1.0))
    if angle < 1e-4 or torch.pi - angle < 1e-4:  # parallel, or opposite, where no great circle is distinguished
        return start + weights[:, None] * (end - start)
    directions = torch.sin((1.0 - weights) * angle)[:, None] * a + torch.sin(weights * angle)[:, None] * b
    return lengths[:, None] * directions / torch.sin(angle)
