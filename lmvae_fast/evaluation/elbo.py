"""What every evaluator of a negative ELBO shares: its two terms without padding, and that figures are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.errors import NumericalError
from lmvae_fast.models.objective import kl_per_dim
from lmvae_fast.text.batch import IGNORED, Batch


def elbo_terms(out: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The two sums of a batch's negative ELBO, fp64 scalars: NLL of its sentences' tokens, and their true KL.

    Whatever the objective made of them: no KL threshold, no length weighting, and no padding, which LangVAE 0.6
    predicts too but which is no part of a sentence's likelihood.
    """
    with torch.no_grad():
        nll = torch.where(own_tokens(batch), out.nll.double(), 0.0).sum()
        return nll, kl_per_dim(out.mu, out.logvar).double().sum()


def own_tokens(batch: Batch) -> Tensor:
    """Which of a batch's targets ``[T]`` are its sentences' own and neither padding nor a prompt's."""
    if batch.targets is not None:
        return batch.labels != IGNORED
    return batch.token_index < batch.tokens[batch.rows]


def without_padding(batch: Batch) -> Batch:
    """The batch with the targets that are padding left out of every likelihood."""
    return replace(batch, labels=torch.where(own_tokens(batch), batch.labels, IGNORED))


def require_finite(figures: Mapping[str, Any], remedy: str) -> None:
    """Raises NumericalError naming the figures that are NaN or infinite."""
    bad = [name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise NumericalError(
            f"evaluation gave a {' and '.join(bad)} that is not finite",
            value={name: figures[name] for name in bad},
            remedy=remedy,
        )
