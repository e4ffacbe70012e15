"""Checks of latents and of the labels beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.errors import LatentError, NumericalError


def check_latents(z: Any, width: int, *, finite: bool = True) -> None:
    """Raises LatentError unless z is floating, ``[batch, width]`` and (``finite``) without NaN or Inf."""
    if not isinstance(z, Tensor):
        raise LatentError(
            "latents must be a tensor",
            value=type(z).__name__,
            limit=f"floating [batch, {width}]",
            remedy="torch.as_tensor(latents)",
        )
    if z.dim() != 2 or z.shape[1] != width or not z.is_floating_point():
        raise LatentError(
            "latents do not fit the model",
            value=f"{z.dtype} {list(z.shape)}",
            limit=f"floating [batch, {width}]",
            remedy="pass one row of latent_dim numbers per sentence",
        )
    if finite:
        check_finite(z, "latents")


def check_finite(rows: Tensor, name: str) -> None:
    """Raises LatentError naming the first row of ``rows`` ``[N, width]`` with NaN or Inf."""
    if not bool(torch.isfinite(rows).all()):
        row = int((~torch.isfinite(rows)).any(1).nonzero()[0])
        raise LatentError(f"{name} contain NaN or Inf", value=f"row {row}", remedy="drop or mend that row")


def check_posterior(mu: Tensor, logvar: Tensor, rows: Sequence[int] | None = None) -> None:
    """Raises NumericalError for a posterior with NaN or Inf, by the row of its sentence (``rows``: of each, where they are
    numbered otherwise). It waits for the device once."""
    finite = torch.isfinite(mu).all(1) & torch.isfinite(logvar).all(1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().squeeze(1).tolist()
        raise NumericalError(
            "encoding gave posteriors that are NaN or infinite",
            value=f"sentence {bad[0] if rows is None else rows[bad[0]]}"
            + (f" and {len(bad) - 1} more" if len(bad) > 1 else ""),
            limit="finite figures",
            remedy="check the weights of encoder and posterior head, or load the model again; or encode in float32",
        )


def check_labels(annotations: Tensor | None, batch: int, labels: int) -> Tensor:
    """The pooled labels ``[batch, labels]`` of a conditional decoder; LatentError where they are missing or misshapen."""
    if annotations is None:
        raise LatentError(
            "a conditional decoder needs the pooled labels beside z",
            limit=f"[{batch}, labels]",
            remedy="pass annotations (model.make_batch makes them)",
        )
    if annotations.shape != (batch, labels):
        raise LatentError("pooled labels do not fit the latents", value=list(annotations.shape), limit=[batch, labels])
    return annotations
