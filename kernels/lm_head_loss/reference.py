"""The truth: full logits, torch's own cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def lm_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """hidden [T, H], weight [V, H], labels [T] -> loss [], nll [T]; shapes and meaning as in `op.lm_head_loss`."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    loss = nll.sum() if token_weights is None else (nll * token_weights.to(nll.dtype)).sum()
    return loss, nll
