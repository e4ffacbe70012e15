"""The algorithm in plain torch: chunks of tokens, the gradient made while the chunk's logits exist.

Runs anywhere torch runs; used where neither the C++ extension nor Triton can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import IGNORE_INDEX


def forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    need: tuple[bool, bool, bool],
    chunk: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One pass over the tokens.

    `need` says which of (hidden, weight, bias) want a gradient. Returns nll [T]; the Jacobian rows d nll_t / d hidden_t
    [T, H], *not* scaled by `row_scale`; and d/d weight [V, H], d/d bias [V] of sum_t row_scale_t nll_t.
    """
    acc = torch.promote_types(hidden.dtype, torch.float32)
    need_hidden, need_weight, need_bias = need
    tokens = hidden.shape[0]
    nll = hidden.new_zeros(tokens, dtype=acc)
    jac = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
    dweight = torch.zeros_like(weight, dtype=acc, memory_format=torch.contiguous_format) if need_weight else None
    dbias = weight.new_zeros(weight.shape[0], dtype=acc) if need_bias else None

    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        h, valid = hidden[rows], labels[rows] != IGNORE_INDEX
        target = labels[rows].where(valid, 0)[:, None]
        logits = h @ weight.T if bias is None else torch.addmm(bias, h, weight.T)
        logits = logits.to(acc)
        if logit_scale != 1.0:
            logits = logits.mul_(logit_scale)
        capped_slope = None
        if softcap is not None:
            logits = logits.div_(softcap).tanh_()
            capped_slope = 1 - logits * logits
            logits.mul_(softcap)
        lse = torch.logsumexp(logits, dim=1, keepdim=True)
        nll[rows] = (lse - logits.gather(1, target)).squeeze(1).where(valid, 0)
        if not any(need):
            continue
        grad = logits.sub_(lse).exp_()  # softmax - onehot, zero where ignored
        grad.scatter_add_(1, target, grad.new_full((), -1.0).expand_as(target))
        grad = grad.where(valid[:, None], 0)
        if capped_slope is not None:
            grad.mul_(capped_slope)
        if jac is not None:
            jac[rows] = (grad.to(weight.dtype) @ weight).mul_(logit_scale)
        if dweight is not None or dbias is not None:
            if row_scale is not None:
                grad.mul_(row_scale[rows, None])
            if dbias is not None:
                dbias.add_(grad.sum(0), alpha=logit_scale)
            if dweight is not None:
                dweight.addmm_(grad.T, h.to(acc), alpha=logit_scale)
    return nll, jac, dweight, dbias
