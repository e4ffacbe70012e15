"""Which sentences go into which batch: a pure function of (lengths, seed, epoch).

Batches hold sentences of similar length, so that the few ops that do pad (the encoder) pad little and the work of
batches is even; every sentence occurs exactly once in an epoch. Being a pure function, a plan is never stored: a
resumed run computes it again and goes on at any batch of it.

The order comes from a hash of (seed, epoch, row) and not from a library's random generator, whose stream may change
between versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmvae_fast.errors import DataError

Rows = NDArray[np.int64]


def _hash(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele et al. 2014): a bijection of 64-bit words that leaves no visible order."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation(count: int, *key: int) -> Rows:
    """A permutation of range(count) that depends on `key` only; int64 [count]."""
    with np.errstate(over="ignore"):  # the arithmetic is meant modulo 2^64
        state = np.zeros(1, np.uint64)
        for word in key:
            state = _hash(state ^ np.uint64(word & 0xFFFFFFFFFFFFFFFF))
        return np.argsort(_hash(state ^ _hash(np.arange(count, dtype=np.uint64))), kind="stable")


@dataclass(frozen=True)
class Groups:
    """Sentences that must stay in one batch: the responses of a prompt that share an aggregate.

    rows: those of each group. prompts [groups]: id of each one's prompt, whose groups stand side by side. per_batch: groups
    in a micro-batch.
    """

    rows: tuple[Rows, ...]
    prompts: Rows
    per_batch: int


def groups_of(sentences: Any, batch_size: int) -> Groups | None:
    """The groups of tokenised prompts with responses, as many to a micro-batch as there is room for whole ones, one at least;
    None for sentences, each of which is for itself."""
    ids = getattr(sentences, "grouped", None)
    if ids is None:
        return None
    ids, prompts = np.asarray(ids, dtype=np.int64), np.asarray(sentences.prompts, dtype=np.int64)
    order = np.argsort(ids, kind="stable")
    starts = np.flatnonzero(np.diff(ids[order], prepend=-1))
    rows = tuple(np.split(order, starts[1:]))
    return Groups(rows, prompts[order][starts], max(1, batch_size // sentences.group_size))


def bounds_of(sentences: Any, rows: Rows) -> tuple[int, ...] | None:
    """Where each group begins in a batch of these rows, and its end; None for sentences."""
    ids = getattr(sentences, "grouped", None)
    if ids is None:
        return None
    own = np.asarray(ids, dtype=np.int64)[rows]
    return (*np.flatnonzero(np.diff(own, prepend=-1)).tolist(), len(own))


@dataclass(frozen=True)
class EpochPlan:
    """The batches of one epoch.

    steps: one entry per optimiser step, each a list of micro-batches, each an int64 array of rows.
    """

    steps: tuple[tuple[Rows, ...], ...]

    def __len__(self) -> int:
        return len(self.steps)


def steps_per_epoch(count: int, batch_size: int, accumulation: int = 1, groups: Groups | None = None) -> int:
    """Optimiser steps in an epoch of `count` sentences, or of groups of them; the last may be smaller."""
    if groups is not None:
        count, batch_size = len(groups.rows), groups.per_batch
    return -(-count // (batch_size * accumulation))


def plan_epoch(
    lengths: Sequence[int] | Rows,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    accumulation: int = 1,
    bucket_batches: int = 16,
    groups: Groups | None = None,
) -> EpochPlan:
    """Plan an epoch: shuffle, sort by length within windows, cut into steps, shuffle the steps.

    lengths [N]: tokens of each sentence. batch_size: sentences of a micro-batch. A step takes batch_size * accumulation
    sentences and cuts them into micro-batches, so the sentences of a step depend on that product only: accumulating k
    batches of b is the same step as one batch of k*b. A window is bucket_batches steps wide; 1 gives plain shuffling
    with sorted micro-batches. Only one step of the epoch (the remainder, at a random place) can be smaller.

    groups: plan whole groups instead of sentences, those of one prompt side by side: every response once in an epoch, and a
    prompt's groups in one step where a step holds a multiple of them. A step is then per_batch * accumulation groups.

    Raises DataError if there is nothing to plan.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    count = len(lengths)
    if count == 0:
        raise DataError("no sentence left to train on", value=0, limit=">= 1", remedy="check the data and max_len")
    if groups is not None:
        return _plan_groups(lengths, groups, seed, epoch, accumulation, bucket_batches)
    size = batch_size * accumulation
    order = permutation(count, seed, epoch, 0)
    window = size * bucket_batches
    pieces = []
    for start in range(0, count, window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        pieces += [rows[i : i + size] for i in range(0, len(rows), size)]
    steps = []
    for index in permutation(len(pieces), seed, epoch, 1):
        piece = pieces[index]
        steps.append(tuple(piece[i : i + batch_size] for i in range(0, len(piece), batch_size)))
    return EpochPlan(tuple(steps))


def _plan_groups(
    lengths: Rows, groups: Groups, seed: int, epoch: int, accumulation: int, bucket_batches: int
) -> EpochPlan:
    """As `plan_epoch`; a prompt is as long as its longest row."""
    longest = np.array([lengths[rows].max() for rows in groups.rows])
    firsts = np.flatnonzero(np.diff(groups.prompts, prepend=-1))
    ends = np.append(firsts[1:], len(groups.rows))
    of_prompt = np.maximum.reduceat(longest, firsts)
    size = groups.per_batch * accumulation
    window = max(1, size * bucket_batches * len(firsts) // len(groups.rows))  # in prompts
    order = permutation(len(firsts), seed, epoch, 0)
    in_windows = []
    for start in range(0, len(order), window):
        prompts = order[start : start + window]
        in_windows += list(prompts[np.argsort(of_prompt[prompts], kind="stable")])
    sequence = [group for prompt in in_windows for group in range(firsts[prompt], ends[prompt])]
    pieces = [sequence[i : i + size] for i in range(0, len(sequence), size)]
    steps = []
    for index in permutation(len(pieces), seed, epoch, 1):
        piece = pieces[index]
        parts = [piece[i : i + groups.per_batch] for i in range(0, len(piece), groups.per_batch)]
        steps.append(tuple(np.concatenate([groups.rows[group] for group in part]) for part in parts))
    return EpochPlan(tuple(steps))


def sorted_batches(lengths: Sequence[int] | Rows, batch_size: int, groups: Groups | None = None) -> list[Rows]:
    """Every row once, longest sentences first: for evaluation and pooling (the first batch shows the peak memory).

    groups: whole ones in every batch.
    """
    if groups is not None:
        sizes = np.asarray(lengths, dtype=np.int64)
        ranked = np.argsort([-sizes[rows].max() for rows in groups.rows], kind="stable")
        parts = [ranked[i : i + groups.per_batch] for i in range(0, len(ranked), groups.per_batch)]
        return [np.concatenate([groups.rows[group] for group in part]) for part in parts]
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
