"""The figures of a held-out set that training itself goes by: loss, ELBO, reconstruction, KL, active units.

They cost one pass over packed batches and the cached features. `lmvae_fast.evaluate` has the costlier ones
(importance-weighted perplexity, mutual information, BLEU).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.errors import DataError
from lmvae_fast.evaluation.elbo import elbo_terms, require_finite
from lmvae_fast.evaluation.metrics import ACTIVE_UNIT_VARIANCE
from lmvae_fast.training.batch_plan import bounds_of, groups_of, sorted_batches
from lmvae_fast.training.distributed import Ranks


def validate(
    model: Any,
    tokenized: Any,
    pooled: Tensor | None,
    *,
    batch_size: int,
    beta: float,
    seed: int = 0,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Evaluate a model on every sentence of `tokenized`, one sample of z each, in eval mode.

    The ranks of a run share each batch's sentences, and all return the figures of the whole.

    Returns means over sentences, in nats: `loss` (the training objective at this beta), `reconstruction` (summed NLL of
    a sentence's tokens), `kl` (true KL, without any threshold) and `elbo` = -(reconstruction + kl); besides them
    `reconstruction_per_token`, `active_units` (dimensions whose posterior mean varies by at least 0.01 over the set)
    and `sentences`.

    The noise depends on `seed` and the batch only, so two evaluations of the same weights agree to the bit; torch's
    generators are left as they were. Raises NumericalError when a figure is not finite,
    DataError when there is no sentence.
    """
    was_training = model.training
    ranks = ranks or Ranks()
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    moments: Tensor | None = None
    shift: Tensor | None = None
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for i, rows in enumerate(sorted_batches(tokenized.lengths, batch_size, groups_of(tokenized, batch_size))):
            share = ranks.share(len(rows), bounds_of(tokenized, rows))
            own = rows if share is None else rows[share.rows]
            batch = model.make_batch(tokenized, own, pooled).to(device)
            batch.share = share
            with autocast():
                out = model(batch, beta=beta, seed=((seed << 32) + i) % 2**62)
            mu = out.mu.double()
            if shift is None or moments is None:
                # Variance from moments about a mean of some sentences: no catastrophic cancellation for a far-off mean.
                shift = ranks.same(mu.mean(0).cpu()).to(device)
                moments = torch.zeros_like(torch.stack([shift, shift]))
            if share is None or share.count:
                sums += torch.stack([out.loss.double() * len(own), *elbo_terms(out, batch), out.tokens.double().sum()])
                moments += torch.stack([(mu - shift).sum(0), (mu - shift).square().sum(0)])
    model.train(was_training)
    if moments is None:
        raise DataError("no sentence to evaluate on", value=0, limit=">= 1", remedy="check the evaluation data")
    sums, moments = ranks.sum(sums), ranks.sum(moments)
    count = len(tokenized)
    loss, reconstruction, kl_mean, tokens = (sums / count).tolist()
    variance = (moments[1] - moments[0].square() / count) / max(count - 1, 1)
    figures = {
        "loss": loss,
        "reconstruction": reconstruction,
        "kl": kl_mean,
        "elbo": -(reconstruction + kl_mean),
        "reconstruction_per_token": reconstruction / tokens,
        "active_units": float((variance >= ACTIVE_UNIT_VARIANCE).sum()),
        "sentences": float(count),
    }
    require_finite(figures, "lower the learning rate, or use precision='bf16' or 'fp32' instead of 'fp16'")
    return figures
