"""What an objective asks of the responses to one prompt together: whose aggregate, words without a decoder, contrast.

Of CVAE with G-Skip (IEEE TAI 7(2), 2026; behaviour of zhangjf-nlp/LLM-based-CVAE). Nothing is read on the host. B responses
in groups that share an aggregate; nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmvae_fast.text.batch import Batch


def aggregate_groups(batch: Batch) -> dict[str, Tensor]:
    """A batch's groups as `models.aggregate` takes them; each response is one for itself where the batch has none."""
    if batch.cu_groups is not None:
        return {"cu_posteriors": batch.cu_groups}
    if batch.groups is not None:
        return {"groups": batch.groups}
    return {"cu_posteriors": torch.arange(batch.batch_size + 1, dtype=torch.int32, device=batch.rows.device)}


def same_group(batch: Batch) -> Tensor:
    """Which responses share a group, bool ``[B, B]``; each is one for itself where the batch has no groups."""
    groups = torch.arange(batch.batch_size, device=batch.rows.device) if batch.groups is None else batch.groups
    return groups.unsqueeze(1) == groups


def word_weights(batch: Batch) -> Tensor:
    """Weight of each predicted token ``[K]``, so that a weighted sum is the mean over responses of their group's mean."""
    same = same_group(batch).to(torch.float32)
    tokens = same @ batch.tokens.to(torch.float32)
    each = same.sum(1) / tokens.clamp_min(1) / max(batch.batch_size, 1)
    return each[batch.rows if batch.targets is None else batch.rows[batch.targets]]


def turned_rows(batch: Batch, turn: int) -> tuple[Tensor, Tensor]:
    """For each response the one ``turn`` places before it in its group, round and round, int64 ``[B]``; and whether that is a
    turn of its group at all (bool ``[B]``): a group of n has n - 1 besides itself."""
    same = same_group(batch)
    before = torch.tril(same, diagonal=-1).sum(1)  # place in the group
    count = same.sum(1)
    wanted = (before - turn) % count
    # The row of the group whose place is the wanted one: places are unique in a group.
    hit = same & (before.unsqueeze(0) == wanted.unsqueeze(1))
    return hit.to(torch.int64).argmax(1), count > turn


def contrast_loss(scores: list[Tensor]) -> Tensor:
    """Mean cross-entropy of telling a response's own posterior from the others of its group.

    scores: by turn (0: its own), the log-likelihood of each response ``[B]``, -inf where there is no such turn.
    """
    table = torch.stack(scores, dim=1)
    return (torch.logsumexp(table, dim=1) - table[:, 0]).mean()
