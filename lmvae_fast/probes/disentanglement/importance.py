"""DCI: disentanglement, completeness and informativeness of a code, from how much each dimension helps to predict factors.

Source: Eastwood & Williams 2018 (openreview By-7dz-AZ), section 2; boosted trees as Locatello et al. 2019 use them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.disentanglement.splits import Split, first_rows, per_value
from lmvae_fast.probes.optional import require
from lmvae_fast.probes.results import Array, Score

WEIGHTINGS = ("mass", "mean")
ESTIMATORS = ("gbt", "forest")


@dataclass(frozen=True, eq=False, repr=False)
class DCI(Score):
    """The three figures; ``value`` is the disentanglement and ``per_factor`` the completeness of each factor.

    Attributes:
        disentanglement: 1 where each important dimension helps with one factor only. NaN for a single factor.
        completeness: 1 where each factor is told by one dimension only. NaN for a single dimension.
        informativeness: mean accuracy on the test rows, 0 to 1; NaN where only an importance matrix was given.
        informativeness_train: the same on the rows that were learnt from.
    """

    disentanglement: float = float("nan")
    completeness: float = float("nan")
    informativeness: float = float("nan")
    informativeness_train: float = float("nan")


def dci_from_importance(R: Any, *, completeness_weights: str = "mass") -> DCI:
    """Disentanglement and completeness of an importance matrix; exact.

    D = sum_d w_d (1 - H_K(R_d / sum)), w_d the dimension's share of all importance; C = sum_k w_k (1 - H_D(R_k / sum))
    with the factor's share. Entropies have the base K and D. A row or column of zeros has no weight.

    Args:
        R: ``[D, K]``, not negative; R[d, k] is the importance of dimension d for factor k.
        completeness_weights: ``"mass"`` weighs factors as disentanglement_lib does, ``"mean"`` takes their plain mean
            (equal where each factor's importances sum to one).

    Returns:
        ``details`` has ``per_dimension`` (1 - H_K of each dimension; 0 for a row of zeros) and ``importance``. Rows and
        columns of zeros are named in ``left_out``; a matrix of zeros scores 0.

    Raises:
        LatentError: R is no finite matrix. DataError: a negative importance.
    """
    checks.one_of("completeness_weights", completeness_weights, WEIGHTINGS)
    importance = checks.latents(R, name="R")
    if importance.min() < 0.0:
        raise DataError("an importance is negative", value=float(importance.min()), limit=">= 0")
    dims, factors = importance.shape
    per_dimension = 1.0 - _entropy_of_rows(importance)
    per_factor = 1.0 - _entropy_of_rows(importance.T)
    of_dimension, of_factor = importance.sum(axis=1), importance.sum(axis=0)
    total = importance.sum() or 1.0
    by_mass = completeness_weights == "mass"
    weights = of_factor / total if by_mass else np.full(factors, 1.0 / factors)
    disentanglement = float(per_dimension @ of_dimension / total) if factors > 1 else float("nan")
    completeness = float(per_factor @ weights) if dims > 1 else float("nan")
    left_out = {
        "dimensions": {int(dim): "no importance" for dim in np.flatnonzero(of_dimension == 0.0)},
        "factors": {int(k): "no dimension is important for it" for k in np.flatnonzero(of_factor == 0.0)},
    }
    return DCI(
        disentanglement,
        per_factor=tuple(per_factor.tolist()) if dims > 1 else (float("nan"),) * factors,
        left_out={name: found for name, found in left_out.items() if found},
        choices={"completeness_weights": completeness_weights},
        details={"per_dimension": per_dimension, "importance": importance},
        disentanglement=disentanglement,
        completeness=completeness,
    )


def dci(
    z: Any,
    y: Any,
    estimator: str = "gbt",
    seed: int = 0,
    *,
    trees: int | None = None,
    split: str = "first_rows",
    train_share: float = 2.0 / 3.0,
    completeness_weights: str = "mass",
    max_rows: int | None = None,
    jobs: int = 1,
) -> DCI:
    """DCI with one classifier of trees for each factor, whose impurity importances are the matrix R.

    Args:
        z: latents ``[N, D]``; constant dimensions have no importance.
        y: factors ``[N, K]``; constant ones are left out, negative values leave the row out for that factor.
        estimator: ``"gbt"``, gradient boosting as in disentanglement_lib (slow: its cost grows with N x D x values), or
            ``"forest"``, a random forest, many times faster and less sharp.
        seed: of the trees, and of the choice of rows under ``max_rows``.
        trees: boosting rounds or trees; None for 100.
        split: ``"first_rows"`` learns from the first ``train_share`` of the rows; ``"per_value"`` from that share of each
            value's rows, drawn with ``seed``.
        train_share: in (0, 1).
        completeness_weights: see :func:`dci_from_importance`.
        max_rows: learn from at most this many rows, drawn with ``seed``.
        jobs: factors fitted at the same time.

    Raises:
        LatentError, DataError, ConfigError: input that does not fit, or a factor with one value among the rows learnt from.
        MissingPackageError: scikit-learn is absent.
    """
    checks.one_of("estimator", estimator, ESTIMATORS)
    rounds = checks.whole("trees", 100 if trees is None else trees, 1)
    pairs = checks.pairs(z, y, min_rows=4, min_factors=1)
    parts = _splits(pairs, split, train_share, seed)
    joblib = require("joblib", "DCI")
    require("sklearn.ensemble", "DCI")
    work = []
    for factor, part in zip(pairs.factors, parts, strict=True):
        train, target = _at_most(part.train, max_rows, seed), pairs.y[:, factor]
        work.append((pairs.z[train], target[train], pairs.z[part.test], target[part.test]))
    # Trees let go of Python's lock; processes would copy the latents, and must not be forked beside other threads.
    fitted = joblib.Parallel(n_jobs=jobs, prefer="threads")(
        joblib.delayed(_importance)(estimator, rounds, seed, *columns) for columns in work
    )
    importance = np.zeros((pairs.z.shape[1], pairs.y.shape[1]))
    accuracies = np.full((2, pairs.y.shape[1]), np.nan)
    for factor, (column, train, test) in zip(pairs.factors, fitted, strict=True):
        importance[:, factor], accuracies[:, factor] = column, (train, test)
    result = dci_from_importance(importance[:, pairs.factors], completeness_weights=completeness_weights)
    per_factor = np.full(pairs.y.shape[1], np.nan)
    per_factor[pairs.factors] = result.per_factor
    dimensions = {**result.left_out.get("dimensions", {}), **pairs.left_out.get("dimensions", {})}
    left_out = {"factors": pairs.left_out.get("factors", {}), "dimensions": dimensions}
    return DCI(
        result.value,
        per_factor=tuple(per_factor.tolist()),
        left_out={name: found for name, found in left_out.items() if found},
        choices={
            "estimator": "gradient boosting" if estimator == "gbt" else "random forest",
            "trees": rounds, "split": split, "train_share": train_share, "max_rows": max_rows, **result.choices,
        },
        seed=seed,
        details={
            "per_dimension": result.details["per_dimension"], "importance": importance,
            "accuracy_train": accuracies[0], "accuracy_test": accuracies[1],
        },
        disentanglement=result.disentanglement,
        completeness=result.completeness,
        informativeness=float(np.nanmean(accuracies[1])),
        informativeness_train=float(np.nanmean(accuracies[0])),
    )  # fmt: skip


def _splits(pairs: checks.Pairs, split: str, train_share: float, seed: int) -> list[Split]:
    checks.one_of("split", split, ("first_rows", "per_value"))
    if split == "first_rows":
        return [first_rows(pairs, int(factor), train_share) for factor in pairs.factors]
    return [per_value(pairs, int(factor), train_share, seed) for factor in pairs.factors]


def _at_most(rows: Array, limit: int | None, seed: int) -> Array:
    if limit is None or len(rows) <= limit:
        return rows
    if limit < 2:
        raise ConfigError("max_rows is out of range", value=limit, limit=">= 2")
    return np.sort(np.random.default_rng(seed).choice(rows, size=limit, replace=False))


def _importance(
    estimator: str, trees: int, seed: int, z: Array, y: Array, z_test: Array, y_test: Array
) -> tuple[Array, float, float]:
    """Importances ``[D]`` and the accuracies on both parts."""
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier

    kind = GradientBoostingClassifier if estimator == "gbt" else RandomForestClassifier
    model = kind(n_estimators=trees, random_state=seed).fit(z, y)
    train, test = (float(np.mean(model.predict(x) == target)) for x, target in ((z, y), (z_test, y_test)))
    return np.abs(model.feature_importances_), train, test


def _entropy_of_rows(matrix: Array) -> Array:
    """Entropy of each row's shares, base the number of columns; 1 for a row of zeros, 0 for a single column."""
    columns = matrix.shape[1]
    if columns == 1:
        return np.zeros(len(matrix))
    total = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, total, out=np.full_like(matrix, 1.0 / columns), where=total > 0.0)
    return -(shares * np.log(np.where(shares > 0.0, shares, 1.0))).sum(axis=1) / np.log(columns)
