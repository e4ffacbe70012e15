"""Metrics over groups of rows that share the value of one factor: z-diff and z-min-var.

Sources: z-diff, Higgins et al. 2017 (openreview Sy2fzU9gl), section 3; z-min-var, Kim & Mnih 2018 (arXiv 1802.05983),
section 4. Rows are drawn from the data instead of a generator, as Carbonneau et al. 2022 (arXiv 2012.09276) do: no
combination of factors need occur.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np

from lmvae_fast.errors import DataError, LatentError
from lmvae_fast.probes import checks
from lmvae_fast.probes.optional import require
from lmvae_fast.probes.results import Array, Score

#: Standard deviation under which z-min-var leaves a dimension out; latents under a N(0, I) prior have about 1.
DEAD_STD = 0.05

_BLOCK = 1 << 22  # latents gathered at a time


def z_diff(
    z: Any,
    y: Any,
    seed: int = 0,
    *,
    group: int = 64,
    num_train: int = 1000,
    num_test: int = 500,
    repetitions: int = 5,
    constant_factors: str = "leave_out",
) -> Score:
    """z-diff: can a linear classifier tell which factor two groups of rows share? Test accuracy, from 1/K to 1.

    A feature is mean_b |z1_b - z2_b| over ``group`` pairs of rows; the rows of a pair differ and share the value of the
    factor to be guessed, and each pair draws a value of its own, evenly among the values that two rows have.

    Args:
        z: latents ``[N, D]``.
        y: factors ``[N, K]``, at least two that vary; constant ones are left out (a factor that never changes is always
            shared), as are values met once.
        seed: of the draws; repetition r draws from the stream (seed, r).
        group: pairs in a group. num_train, num_test: groups learnt from and judged on, each of a factor drawn evenly.
        repetitions: with fresh draws; ``value`` is their mean and ``spread`` their standard deviation.
        constant_factors: ``"keep"`` draws constant factors too, as public implementations do.

    Returns:
        ``per_factor`` is the share of each factor's groups that were recognised; ``details["per_repetition"]``.

    The features are not scaled, so the classifier's L2 penalty weighs more on a latent of small numbers: compare only
    latents of one scale, at one ``num_train``.
    """
    pairs, draws, rare = _prepare(z, y, seed, group, num_train, num_test, repetitions, constant_factors)
    accuracies, recalls = [], []
    for repetition in range(repetitions):
        source = np.random.default_rng([seed, repetition])
        targets = source.integers(len(pairs.factors), size=num_train + num_test)
        features = np.empty((len(targets), pairs.z.shape[1]))
        for place in range(len(pairs.factors)):
            members = np.flatnonzero(targets == place)
            for start in range(0, len(members), _step(group, pairs.z.shape[1])):
                part = members[start : start + _step(group, pairs.z.shape[1])]
                first, second = draws[place].row_pairs(source, len(part) * group)
                gap = np.abs(pairs.z[first] - pairs.z[second])
                features[part] = gap.reshape(len(part), group, -1).mean(axis=1)
        train, test = slice(num_train), slice(num_train, None)
        predicted = _classify(features[train], targets[train], features[test])
        accuracies.append(float(np.mean(predicted == targets[test])))
        recalls.append(_recall(predicted, targets[test], len(pairs.factors)))
    choices = {"group": group, "num_train": num_train, "num_test": num_test, "repetitions": repetitions,
               "classifier": "logistic regression, features not scaled", "rows": "pairs of the data"}  # fmt: skip
    return _summary(pairs, rare, accuracies, recalls, choices, seed)


def z_min_var(
    z: Any,
    y: Any,
    seed: int = 0,
    *,
    group: int = 64,
    num_train: int = 800,
    num_test: int = 800,
    dead_std: float = DEAD_STD,
    repetitions: int = 5,
    constant_factors: str = "leave_out",
) -> Score:
    """z-min-var (the FactorVAE score): the dimension that varies least in a group that shares a factor names the factor.

    The vote of a group is argmin_d Var_group(z_d) / Var(z_d); each dimension stands for the factor that most of its votes
    came from; the value is the share of test groups named rightly, from 1/K to 1.

    Args:
        z: latents ``[N, D]``.
        y: factors ``[N, K]``, at least two that vary; constant ones are left out, as are values met once.
        seed: of the draws.
        group: rows in a group, all different where the value has as many, in whole rounds of its rows otherwise.
        num_train, num_test: groups that vote and groups judged, each of a factor and a value drawn evenly.
        dead_std: dimensions of a standard deviation below this have no vote and are named; a constant one would win every
            vote with 0/0 otherwise.
        repetitions: with fresh draws.
        constant_factors: ``"keep"`` draws constant factors too, as public implementations do; their votes are noise.

    Raises:
        LatentError: no dimension reaches ``dead_std``.
    """
    pairs, draws, rare = _prepare(z, y, seed, group, num_train, num_test, repetitions, constant_factors)
    variance = pairs.z.var(axis=0, ddof=1)
    alive = np.flatnonzero(np.sqrt(variance) >= max(dead_std, np.finfo(float).tiny))
    if len(alive) == 0:
        raise LatentError(
            "no dimension varies enough for z-min-var",
            value=f"largest standard deviation {np.sqrt(variance.max()):.3g}",
            limit=f">= {dead_std}",
            remedy="lower dead_std, or train a model whose posterior has not collapsed",
        )
    accuracies, recalls = [], []
    scaled = pairs.z[:, alive] / np.sqrt(variance[alive])
    for repetition in range(repetitions):
        source = np.random.default_rng([seed, repetition])
        targets = source.integers(len(pairs.factors), size=num_train + num_test)
        votes = np.empty(len(targets), dtype=np.int64)
        for place in range(len(pairs.factors)):
            members = np.flatnonzero(targets == place)
            for start in range(0, len(members), _step(group, len(alive))):
                part = members[start : start + _step(group, len(alive))]
                rows = draws[place].groups(source, len(part), group)
                votes[part] = alive[scaled[rows].var(axis=1, ddof=1).argmin(axis=1)]
        tables = [
            _votes(targets[rows], votes[rows], len(pairs.factors), pairs.z.shape[1])
            for rows in (slice(num_train), slice(num_train, None))
        ]
        accuracies.append(majority_vote_accuracy(*tables))
        winners = tables[0].argmax(axis=0)
        recalls.append(_recall(winners[votes[num_train:]], targets[num_train:], len(pairs.factors)))
    dead = {int(dim): f"standard deviation {np.sqrt(variance[dim]):.3g} below {dead_std}"
            for dim in range(pairs.z.shape[1]) if dim not in set(alive.tolist())}  # fmt: skip
    if dead:
        pairs.left_out["dimensions"] = dead
    choices = {
        "group": group,
        "num_train": num_train,
        "num_test": num_test,
        "repetitions": repetitions,
        "dead_std": dead_std,
    }
    return _summary(pairs, rare, accuracies, recalls, choices, seed)


def majority_vote_accuracy(train_votes: Any, test_votes: Any) -> float:
    """Share of the test votes that fall to the factor with the most training votes of their dimension; exact.

    Args:
        train_votes, test_votes: ``[K, D]`` counts.
    """
    train, test = np.asarray(train_votes), np.asarray(test_votes)
    if train.ndim != 2 or train.shape != test.shape or test.sum() <= 0:
        raise DataError("votes must be two tables [K, D], not empty", value=f"{list(train.shape)}, {list(test.shape)}")
    return float(test[train.argmax(axis=0), np.arange(train.shape[1])].sum() / test.sum())


def group_accuracy(x_train: Any, y_train: Any, x_test: Any, y_test: Any) -> float:
    """Test accuracy of z-diff's classifier on features ``[M, D]`` made elsewhere and the factor of each ``[M]``."""
    predicted = _classify(np.asarray(x_train), np.asarray(y_train), np.asarray(x_test))
    return float(np.mean(predicted == np.asarray(y_test)))


class _Draws:
    """Draws rows that share a value of one factor. Rows are kept sorted by value, those of rare values left out."""

    def __init__(self, column: Array, num_values: int):
        counts = np.bincount(column[column >= 0], minlength=num_values)
        self.values = np.flatnonzero(counts >= 2)
        self.rare = {int(value): f"{counts[value]} row" for value in np.flatnonzero(counts == 1)}
        self.order = np.argsort(column, kind="stable")[int(np.sum(column < 0)) :]
        self.start = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self.counts = counts

    def row_pairs(self, source: np.random.Generator, number: int) -> tuple[Array, Array]:
        """``number`` pairs of different rows, each pair of a value of its own."""
        value = self.values[source.integers(len(self.values), size=number)]
        count, start = self.counts[value], self.start[value]
        first = source.integers(count)
        second = (first + 1 + source.integers(count - 1)) % count
        return self.order[start + first], self.order[start + second]

    def groups(self, source: np.random.Generator, number: int, size: int) -> Array:
        """``[number, size]`` rows, each group of one value."""
        rows = np.empty((number, size), dtype=np.int64)
        for place, value in enumerate(self.values[source.integers(len(self.values), size=number)]):
            count, start = int(self.counts[value]), int(self.start[value])
            rounds, rest = divmod(size, count)
            within = np.concatenate([np.tile(np.arange(count), rounds), source.choice(count, size=rest, replace=False)])
            rows[place] = self.order[start + within]
        return rows


def _prepare(
    z: Any, y: Any, seed: int, group: int, num_train: int, num_test: int, repetitions: int, constant_factors: str
) -> tuple[checks.Pairs, list[_Draws], dict[str, str]]:
    checks.whole("seed", seed, 0)
    for name, value in (("num_train", num_train), ("num_test", num_test), ("repetitions", repetitions)):
        checks.whole(name, value, 1)
    checks.whole("group", group, 2)
    pairs = checks.pairs(z, y, min_rows=4, min_factors=2)
    checks.one_of("constant_factors", constant_factors, ("leave_out", "keep"))
    if constant_factors == "keep":
        pairs.left_out.pop("factors", None)
    draws, kept = [], []
    rare: dict[str, str] = {}
    for factor in range(pairs.y.shape[1]) if constant_factors == "keep" else pairs.factors.tolist():
        drawn = _Draws(pairs.y[:, factor], int(pairs.num_values[factor]))
        rare |= {f"factor {factor}, value {value}": "one row" for value in drawn.rare}
        if len(drawn.values):
            draws.append(drawn)
            kept.append(factor)
        else:
            pairs.left_out.setdefault("factors", {})[factor] = "no value is met twice"
    if len(kept) < 2:
        raise DataError("too few factors have a value that two rows share", value=len(kept), limit=">= 2")
    kept_pairs = replace(pairs, factors=np.array(kept))
    return kept_pairs, draws, rare


def _step(group: int, dims: int) -> int:
    return max(1, _BLOCK // (group * dims))


def _classify(x_train: Array, y_train: Array, x_test: Array) -> Array:
    linear = require("sklearn.linear_model", "z-diff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=require("sklearn.exceptions", "z-diff").ConvergenceWarning)
        return linear.LogisticRegression(max_iter=1000).fit(x_train, y_train).predict(x_test)


def _votes(targets: Array, votes: Array, factors: int, dims: int) -> Array:
    return np.bincount(targets * dims + votes, minlength=factors * dims).reshape(factors, dims)


def _recall(predicted: Array, targets: Array, factors: int) -> Array:
    right = np.bincount(targets[predicted == targets], minlength=factors)
    total = np.bincount(targets, minlength=factors)
    return np.divide(right, total, out=np.full(factors, np.nan), where=total > 0)


def _summary(
    pairs: checks.Pairs,
    rare: dict[str, str],
    accuracies: list[float],
    recalls: list[Array],
    choices: dict[str, Any],
    seed: int,
) -> Score:
    per_factor = np.full(pairs.y.shape[1], np.nan)
    per_factor[pairs.factors] = np.nanmean(recalls, axis=0)
    left_out: dict[str, Any] = {**pairs.left_out, **({"values": rare} if rare else {})}
    return Score(
        float(np.mean(accuracies)),
        per_factor=tuple(per_factor.tolist()),
        left_out=left_out,
        choices={**choices, "chance": 1.0 / len(pairs.factors)},
        seed=seed,
        spread=float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
        details={"per_repetition": accuracies},
    )
