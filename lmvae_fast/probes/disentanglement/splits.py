"""Rows to learn from and rows to be judged on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmvae_fast.errors import DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.results import Array


@dataclass(frozen=True)
class Split:
    """Indices of rows, disjoint."""

    train: Array
    test: Array


def first_rows(pairs: checks.Pairs, factor: int, train_share: float) -> Split:
    """The first ``train_share`` of all N rows, and the rest; without the rows that have no value of the factor."""
    checks.share("train_share", train_share)
    cut = int(len(pairs.z) * train_share + 1e-9)
    rows = pairs.rows(factor)
    return _checked(pairs, factor, rows[rows < cut], rows[rows >= cut])


def per_value(pairs: checks.Pairs, factor: int, train_share: float, seed: int) -> Split:
    """Of each value's rows ``train_share``, rounded up, in an order drawn with ``seed``; and the rest."""
    checks.share("train_share", train_share)
    source = np.random.default_rng(seed)
    train, test = [], []
    for value in range(int(pairs.num_values[factor])):
        rows = source.permutation(np.flatnonzero(pairs.y[:, factor] == value))
        cut = int(np.ceil(len(rows) * train_share))
        train.append(rows[:cut])
        test.append(rows[cut:])
    return _checked(pairs, factor, np.sort(np.concatenate(train)), np.sort(np.concatenate(test)))


def _checked(pairs: checks.Pairs, factor: int, train: Array, test: Array) -> Split:
    values = len(np.unique(pairs.y[train, factor]))
    if values < 2 or len(test) == 0:
        raise DataError(
            f"factor {factor} leaves too little to learn from or to be judged on",
            value=f"{values} values in {len(train)} train rows, {len(test)} test rows",
            limit="two values to learn from and a row to be judged on",
            remedy="shuffle the rows, use split='per_value', or leave the factor out",
        )
    return Split(train, test)
