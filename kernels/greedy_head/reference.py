"""greedy_head in plain torch: the truth, and the packed form of the weight with what its rounding can cost."""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 32  # vocabulary entries that lie together (kHeadPanel in csrc/cpu/greedy_head.h)
DEPTH = 32  # inputs of one matrix-unit step
_PANELS_AT_ONCE = 64


def greedy_head(hidden: Tensor, weight: Tensor) -> Tensor:
    """argmax over v of hidden [M, K] . weight [V, K]: int64 [M]."""
    return (hidden @ weight.t()).argmax(-1)


def greedy_product(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """argmax and largest over v of hidden [M, K] . weight [V, K]: int64 and fp32 [M]."""
    logits = hidden @ weight.t()
    ids = logits.argmax(-1)
    return ids, logits.gather(-1, ids[:, None]).squeeze(-1).float()


def pack_panels(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight [V, K] rounded to bf16 in panels, and per panel the largest norms of its rows.

    Returns:
        panels: bf16 ``[ceil(V / 32), ceil(K / 32), 2, 16, 16, 2]``: steps of 32 inputs, halves of 16 entries, 16 pairs of
            inputs, the entries, the two inputs of the pair. That is how AMX tiles read it. Zeros beyond K; beyond V the
            last entry again, which changes no maximum.
        errors: fp32 ``[panels]``, the largest ``|w - bf16(w)|`` (2-norm) of a panel's rows.
        norms: fp32 ``[panels]``, the largest ``|w| + |w - bf16(w)|``.
    """
    vocabulary, inputs = weight.shape
    count, steps = -(-vocabulary // PANEL), -(-inputs // DEPTH)
    panels = torch.zeros(count, steps, 2, PANEL // 2, DEPTH // 2, 2, dtype=torch.bfloat16, device=weight.device)
    errors, norms = (torch.zeros(count, dtype=torch.float32, device=weight.device) for _ in range(2))
    for first in range(0, count, _PANELS_AT_ONCE):  # no second copy of the whole weight
        rows = weight[first * PANEL : (first + _PANELS_AT_ONCE) * PANEL]
        some = -(-rows.shape[0] // PANEL)
        rows = torch.cat([rows, rows[-1:].expand(some * PANEL - rows.shape[0], -1)])
        rows = torch.nn.functional.pad(rows, (0, steps * DEPTH - inputs))
        rounded = rows.to(torch.bfloat16)
        # in fp64 and rounded up: the norms are a bound
        error = torch.linalg.vector_norm(rows - rounded.to(rows.dtype), dim=1, dtype=torch.float64)
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) + error
        part = slice(first, first + some)
        panels[part] = rounded.view(some, 2, 16, steps, 16, 2).permute(0, 3, 1, 4, 2, 5)
        errors[part], norms[part] = (one.view(some, PANEL).amax(1) * (1 + 1e-6) for one in (error, norm))
    return panels, errors, norms
