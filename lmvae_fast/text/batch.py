"""A batch of sentences, packed without padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of what is not predicted


@dataclass(frozen=True)
class Share:
    """Which sentences of a batch of ``total`` one of ``step`` processes has: ``first``, ``first + step``, ...

    A process for which none is left has the batch's first sentence, without weight, so that all do the same kind of work.

    bounds: where groups of sentences that must stay together begin in the whole batch, and its end; the processes then share
    groups in this way instead of sentences. None: each sentence is a group.
    """

    first: int
    step: int
    total: int
    bounds: tuple[int, ...] | None = None

    @property
    def rows(self) -> Sequence[int]:
        """Places in the whole batch."""
        if self.bounds is None:
            return range(self.first, self.total, self.step) or range(1)
        return self._rows_of(range(self.first, len(self.bounds) - 1, self.step) or range(1))

    @property
    def count(self) -> int:
        """Sentences that count."""
        if self.bounds is None:
            return len(range(self.first, self.total, self.step))
        return len(self._rows_of(range(self.first, len(self.bounds) - 1, self.step)))

    def _rows_of(self, groups: range) -> list[int]:
        bounds = self.bounds or ()
        return [row for group in groups for row in range(bounds[group], bounds[group + 1])]


@dataclass
class Batch:
    """Sentences laid end to end; T tokens of B sentences.

    Attributes:
        input_ids: what the decoder reads, int64 ``[T]``: start token, t0, t1, ...
        labels: what it must predict, int64 ``[T]``: t0, t1, ..., end token.
        cu_seqlens: where each sentence begins, int32 ``[B + 1]``.
        max_seqlen: tokens of the longest sentence, known on the host.
        rows: sentence of each token, int64 ``[T]``.
        token_index: place of each token in its sentence, int64 ``[T]``.
        tokens: tokens that count as the sentence's own, int64 ``[B]``.
        indices: row of each sentence in its dataset, int64 ``[B]`` (named when a batch fails).
        pooled: features of a frozen encoder, ``[B, features]``, or None.
        encoder_ids, encoder_mask: the encoder's padded input, int64 ``[B, S]``, when there are no pooled features. With
            ``encoder_cu_seqlens`` they are packed, ``[Te]``, and the mask (0 on padding) may be None.
        encoder_cu_seqlens, encoder_max_seqlen: where each sentence begins in a packed encoder input, int32 ``[B + 1]``, and
            tokens of the longest, known on the host; None for a padded one.
        targets: places of the tokens whose label is predicted, int64 ``[K]``, increasing; None for all. The labels of the
            others, those of prompts, are -100.
        groups: id of the sentences that each one shares an aggregate posterior with, int64 ``[B]``, or None.
        cu_groups: where each group begins, int32 ``[G + 1]``; None where a group's sentences do not stand side by side.
        max_group: sentences of the largest group, known on the host.
        prompt_ids: what the decoder reads of each prompt, or None.
        annotations: pooled label features, float32 ``[B, labels]``, or None.
        texts: the sentences, or None.
        fillers: the last so many sentences only fill the batch up to a size that a recorded step has: nothing of them is
            predicted (their labels are -100, their ``tokens`` 0), and no figure counts them. See :func:`filled`.
        share: what these sentences are of a batch that several processes share, or None: the noise of a sentence is that
            of its place in the whole batch.
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    rows: Tensor
    token_index: Tensor
    tokens: Tensor
    indices: Tensor
    pooled: Tensor | None = None
    encoder_ids: Tensor | None = None
    encoder_mask: Tensor | None = None
    encoder_cu_seqlens: Tensor | None = None
    encoder_max_seqlen: int = 0
    targets: Tensor | None = None
    groups: Tensor | None = None
    cu_groups: Tensor | None = None
    max_group: int = 1
    prompt_ids: list[tuple[int, ...]] | None = None
    annotations: Tensor | None = None
    texts: list[str] | None = None
    fillers: int = 0
    share: Share | None = None

    @property
    def batch_size(self) -> int:
        """Number of sentences B."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def counted(self) -> int:
        """Number of sentences without fillers."""
        return self.batch_size - self.fillers

    def own(self, x: Tensor) -> Tensor:
        """What of a tensor ``[B, ...]`` belongs to sentences that count; a view."""
        return x[: self.counted] if self.fillers else x

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


def filled(batch: Batch, tokens: int, fillers: int, longest: int) -> Batch:
    """The batch with sentences after its own that fill it up to ``tokens`` tokens, none longer than ``longest``.

    They read the batch's first token again and again, under the features and labels of its first sentence, so that nothing
    that is computed of them is out of the ordinary. Raises ValueError where so many fillers cannot have so many tokens, each
    one at least.
    """
    missing = tokens - batch.num_tokens
    if not fillers <= missing <= fillers * longest:
        raise ValueError(f"{fillers} sentences of 1 to {longest} tokens cannot have {missing} tokens")
    lengths = torch.full((fillers,), missing // fillers)
    lengths[: missing % fillers] += 1
    ends = batch.cu_seqlens[-1] + lengths.cumsum(0)
    rows = torch.repeat_interleave(torch.arange(fillers), lengths)
    index = torch.arange(missing) - (lengths.cumsum(0) - lengths)[rows]

    def repeated(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat([x, x[:1].expand(fillers, *x.shape[1:])])

    return dataclasses.replace(
        batch,
        input_ids=torch.cat([batch.input_ids, batch.input_ids[:1].expand(missing)]),
        labels=torch.cat([batch.labels, batch.labels.new_full((missing,), IGNORED)]),
        cu_seqlens=torch.cat([batch.cu_seqlens, ends.to(torch.int32)]),
        max_seqlen=longest,
        rows=torch.cat([batch.rows, rows + batch.batch_size]),
        token_index=torch.cat([batch.token_index, index]),
        tokens=torch.cat([batch.tokens, batch.tokens.new_zeros(fillers)]),
        indices=torch.cat([batch.indices, batch.indices[:1].expand(fillers)]),
        pooled=repeated(batch.pooled),
        annotations=repeated(batch.annotations),
        fillers=fillers,
    )


def pack(inputs: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> dict[str, Tensor | int]:
    """The packed fields of :class:`Batch` (all but ``tokens`` and ``indices``) for sentences given as lists of ids."""
    lengths = [len(sentence) for sentence in inputs]
    if lengths != [len(sentence) for sentence in labels]:
        raise ValueError("inputs and labels must have the same lengths, sentence by sentence")
    per_sentence = torch.tensor(lengths, dtype=torch.int64)
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = per_sentence.cumsum(0)
    rows = torch.repeat_interleave(torch.arange(len(lengths)), per_sentence)
    return {
        "input_ids": torch.tensor([token for sentence in inputs for token in sentence], dtype=torch.int64),
        "labels": torch.tensor([token for sentence in labels for token in sentence], dtype=torch.int64),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max(lengths, default=0),
        "rows": rows,
        "token_index": torch.arange(len(rows)) - cu_seqlens[:-1].to(torch.int64)[rows],
    }
