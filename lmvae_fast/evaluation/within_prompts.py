"""How latents are used among the responses to one prompt: the figures of CVAE with G-Skip's table, averaged over prompts.

Source: IEEE TAI 7(2), 2026, as its public code (zhangjf-nlp/LLM-based-CVAE) computes them: closed KL, mutual information by
samples against the joint and the marginal aggregates, active and collapsed units within a prompt (not over the corpus).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmvae_fast.errors import DataError
from lmvae_fast.kernels import philox
from lmvae_fast.models import aggregate
from lmvae_fast.models.objective import kl_per_dim

#: Variance of posterior means above which a dimension is active, and KL of its aggregate below which it has collapsed.
THRESHOLDS = (0.03, 0.1, 0.3)


@torch.no_grad()
def within_prompts(
    mu: Tensor,
    logvar: Tensor,
    prompts: Sequence[int],
    *,
    samples: int = 16,
    thresholds: Sequence[float] = THRESHOLDS,
    seed: int = 0,
    min_var: float = aggregate.CVAE_MIN_VAR,
) -> dict[str, float]:
    """Figures of each prompt's responses, averaged over the prompts.

    Args:
        mu, logvar: posteriors of all responses ``[N, D]``.
        prompts: id of each response's prompt ``[N]``, in any order.
        samples: of each posterior, for aggregates; drawn from ``seed``, a response's by its row.
        thresholds: of active and collapsed units.
        min_var: constant of the densities (``aggregate.CVAE_MIN_VAR``: the public code's).

    Returns:
        ``kl``: of a posterior to the prior, closed, nats; ``mutual_information``: between a prompt's responses and their
        latents, against the joint aggregate, at most ln(responses); ``marginal_mutual_information``: the same against each
        dimension's aggregate, summed; ``active_units_T``: dimensions whose posterior mean varies by more than T over the
        prompt's responses (unbiased; none of a single one); ``collapsed_units_T``: dimensions whose aggregate is nearer to the
        prior than T nats; ``prompts``, and ``single``: those of one response.

    Raises DataError for no response, or ids and posteriors of different number.
    """
    if mu.dim() != 2 or mu.shape != logvar.shape or len(prompts) != mu.shape[0] or not len(prompts):
        raise DataError(
            "posteriors and prompts do not fit", value=f"{list(mu.shape)}, {list(logvar.shape)}, {len(prompts)} prompts",
            limit="[N >= 1, D] twice, and an id for each",
        )  # fmt: skip
    mu, logvar = mu.double().cpu(), logvar.double().cpu()
    _, place = torch.tensor(list(prompts)).unique(return_inverse=True)
    count = int(place.max()) + 1
    responses = torch.bincount(place, minlength=count).double()

    def per_prompt(rows: Tensor) -> Tensor:
        """Mean over each prompt's responses of ``[N, ..]``."""
        sums = rows.new_zeros(count, *rows.shape[1:]).index_add_(0, place, rows)
        return sums / responses.view(-1, *[1] * (rows.dim() - 1))

    key = philox.seed_tensor(seed, "cpu")
    noise = philox.normal(key, (mu.shape[0], samples * mu.shape[1]), which=torch.arange(mu.shape[0])).double()
    z = mu + torch.exp(0.5 * logvar) * noise.unflatten(1, (samples, -1)).movedim(1, 0)
    options = {"groups": place, "min_var": min_var}
    figures = {
        "kl": float(per_prompt(kl_per_dim(mu, logvar).sum(1)).mean()),
        "mutual_information": float(per_prompt(aggregate.mutual_information(z, mu, logvar, **options)).mean()),
        "marginal_mutual_information": float(
            per_prompt(aggregate.mutual_information(z, mu, logvar, per_dim=True, **options)).mean()
        ),
    }
    centred = mu - per_prompt(mu)[place]
    variance = per_prompt(centred.square()) * (responses / (responses - 1).clamp_min(1))[:, None]
    gap = per_prompt(aggregate.aggregate_kl_per_dim(z, mu, logvar, **options))
    for threshold in thresholds:
        figures[f"active_units_{threshold:g}"] = float((variance > threshold).sum(1).double().mean())
        figures[f"collapsed_units_{threshold:g}"] = float((gap < threshold).sum(1).double().mean())
    return figures | {"prompts": float(count), "single": float((responses == 1).sum())}
