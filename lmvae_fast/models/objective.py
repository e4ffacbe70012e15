"""The training objective as pure arithmetic on per-sentence figures.

A model brings the negative log-likelihood of each sentence and its KL; this file says how the published systems turn
them into one scalar. Nothing here reads a tensor's value on the host, so all of it can sit inside a captured graph.

Sources: Optimus (arXiv 2004.04092, section 3; per-dimension hard mask), LangVAE (arXiv 2505.00004; per-sentence
threshold), Kingma et al. 2016 (arXiv 1606.04934, appendix C.8; free bits).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lmvae_fast.config import KL_MODES, OBJECTIVES
from lmvae_fast.errors import ConfigError


class Objective(NamedTuple):
    """What `combine` returns: `loss` scalar, `reconstruction` [B] and `kl` [B] (the terms that entered the loss)."""

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor


def kl_per_dim(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of every latent dimension, in nats.

    mu, logvar [..., D]; returns [..., D] in fp32 (fp64 for fp64 inputs). `expm1(lv) - lv` keeps the digits that
    `exp(lv) - lv - 1` loses near the prior, where a collapsed dimension lives.
    """
    dtype = torch.float64 if mu.dtype == torch.float64 else torch.float32
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    return 0.5 * (mu.square() + torch.expm1(logvar) - logvar)


def kl_reduce(kl_dim: Tensor, mode: str = "sum", target: float = 0.0, *, beta: float | Tensor | None = None) -> Tensor:
    """Reduce the KL of each dimension [B, D] to the KL term of each sentence [B].

    mode                what is kept
    sum                 every dimension
    dim_threshold       dimensions with KL_d > target: a hard mask, not a maximum (Optimus's lambda)
    free_bits           max(KL_d, target) per dimension; below the target the gradient is zero
    sample_threshold    the sentence's whole KL if it is > target, else zero (LangVAE's target_kl)

    beta: when given, `dim_threshold` masks nothing while beta is 0, as Optimus does: the KL has no weight there, and
    the reported figure is then the true KL. A float or a 0-dim tensor. Raises ConfigError for an unknown mode.
    """
    if mode == "sum":
        return kl_dim.sum(-1)
    if mode == "dim_threshold":
        keep = kl_dim > target
        if isinstance(beta, Tensor):
            keep = keep | (beta == 0).to(keep.device)
        elif beta is not None and beta == 0:
            return kl_dim.sum(-1)
        return torch.where(keep, kl_dim, 0.0).sum(-1)
    if mode == "free_bits":
        return kl_dim.clamp_min(target).sum(-1)
    if mode == "sample_threshold":
        kl = kl_dim.sum(-1)
        return torch.where(kl > target, kl, 0.0)
    raise ConfigError("unknown KL mode", value=mode, limit=", ".join(KL_MODES), remedy="set kl_mode to one of these")


def kl_mode_at(mode: str, beta: float | Tensor) -> str:
    """The mode that holds at this weight: Optimus masks nothing while the KL has no weight."""
    return "sum" if mode == "dim_threshold" and isinstance(beta, (int, float)) and beta == 0 else mode


def token_weights(
    tokens: Tensor, rows: Tensor, *, objective: str = "elbo", length_normalize: bool = False, fillers: int = 0
) -> Tensor:
    """How much each token's NLL counts in the loss ``[T]``, so that one weighted sum is the mean of `combine`'s reconstruction.

    tokens [B]: targets of each sentence, floating; rows int64 [T]: sentence of each token. fillers: sentences that ``rows``
    names after those B, none of whose tokens is predicted.
    """
    sentences = max(tokens.shape[0], 1)
    if objective == "langvae-0.6":
        return (tokens.sum() / sentences**2).expand(rows.shape[0])
    weights = torch.ones_like(tokens) if not length_normalize else 1.0 / tokens.clamp_min(1)
    weights = weights / sentences
    return (torch.nn.functional.pad(weights, (0, fillers)) if fillers else weights)[rows]


def combine(
    nll: Tensor,
    tokens: Tensor,
    kl: Tensor,
    beta: float | Tensor,
    *,
    objective: str = "elbo",
    length_normalize: bool = False,
) -> Objective:
    """Loss of a batch from its sentences' terms: mean_b(reconstruction_b + beta * kl_b).

    nll [B]: summed token NLL of each sentence, nats (fp32 or fp64). tokens [B]: number of its target tokens.
    kl [B]: its KL term (already reduced by mode). beta: float or 0-dim tensor.

    objective "elbo" (default): reconstruction_b = nll_b, or nll_b / tokens_b with `length_normalize` (Optimus's
    option).
    objective "langvae-0.6": what LangVAE 0.6 computes: reconstruction_b = (sum of all the batch's NLLs) * tokens_b / B.
    For it `nll` must include the padding positions (every sentence padded to the batch's longest with the pad token as
    a target), while `tokens` counts the real tokens only.

    Raises ConfigError for an unknown objective and for length_normalize together with "langvae-0.6".
    """
    if objective == "elbo":
        reconstruction = nll / tokens.to(nll.dtype).clamp_min(1) if length_normalize else nll
    elif objective == "langvae-0.6":
        if length_normalize:
            raise ConfigError(
                "length_normalize contradicts objective 'langvae-0.6'",
                value="length_normalize=True",
                limit="the released loss has its own length weighting",
                remedy="use objective='elbo' or length_normalize=False",
            )
        # max(.., 1) only matters for an empty batch, whose loss is then an empty mean (NaN) as for any other objective
        reconstruction = nll.sum() * tokens.to(nll.dtype) / max(nll.shape[0], 1)
    else:
        raise ConfigError(
            "unknown objective", value=objective, limit=", ".join(OBJECTIVES), remedy="set objective to one of these"
        )
    loss = (reconstruction + beta * kl.to(reconstruction.dtype)).mean()
    return Objective(loss, reconstruction, kl)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum a packed per-token tensor over each sentence.

    values [T] or [..., T]; cu_seqlens int32 or int64 [B + 1]. Returns [..., B] in the dtype of `values`, an empty
    sentence giving 0. Deterministic on every device and free of host synchronisation, unlike an index_add.
    """
    # unsafe=True: the check of the offsets would read them on the host
    offsets = cu_seqlens.to(torch.int64).expand(*values.shape[:-1], -1).contiguous()
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=values.dim() - 1, unsafe=True)
