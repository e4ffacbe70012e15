"""How well factors are predicted from the code: explicitness (from all of it) and SAP (from single dimensions).

Sources: explicitness, Ridgeway & Mozer 2018 (arXiv 1802.05312), section 3; SAP, Kumar et al. 2018 (arXiv 1711.00848),
section 3; settings of the classifiers as Locatello et al. 2019 (arXiv 1811.12359) use them.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from lmvae_fast.probes import checks
from lmvae_fast.probes.disentanglement import linear_svc
from lmvae_fast.probes.disentanglement.splits import first_rows, per_value
from lmvae_fast.probes.optional import require
from lmvae_fast.probes.results import Array, Score

#: Settings of SAP's classifiers in two public implementations.
SAP_VARIANTS: dict[str, dict[str, Any]] = {
    "disentanglement_lib": {"C": 0.01, "class_weight": "balanced", "split": "first_rows", "train_share": 2.0 / 3.0},
    "langspace": {"C": 0.01, "class_weight": None, "split": "per_value", "train_share": 0.8},
}

_LEAST_VARIANCE = 1e-12


def explicitness(z: Any, y: Any, *, train_share: float = 2.0 / 3.0, C: float = 1.0, max_iter: int = 1000) -> Score:
    """Mean over factors of the ROC-AUC of a linear classifier: 0.5 is chance, 1 each value apart from the others.

    For each factor a multinomial logistic regression learns from the first rows (standardised by their mean and standard
    deviation) and is judged on the rest: the AUC of each value against all others, their plain mean.

    Args:
        z: latents ``[N, D]``; dimensions constant over the rows learnt from are left out.
        y: factors ``[N, K]``; constant ones are left out.
        train_share: of the rows, from the first.
        C: inverse strength of the L2 penalty. max_iter: of the solver.

    Returns:
        ``details["per_factor_train"]``: the same on the rows learnt from. Values without a test row (or without rows of
        other values) have no AUC and are named in ``left_out["values"]``.
    """
    pairs = checks.pairs(z, y, min_rows=4, min_factors=1)
    linear = require("sklearn.linear_model", "explicitness")
    metrics = require("sklearn.metrics", "explicitness")
    per_factor, train_figures = np.full((2, pairs.y.shape[1]), np.nan)
    missing: dict[str, str] = {}
    for factor in pairs.factors:
        part = first_rows(pairs, factor, train_share)
        mean, std = pairs.z[part.train].mean(axis=0), pairs.z[part.train].std(axis=0)
        alive = std > 0.0
        scaled = (pairs.z[:, alive] - mean[alive]) / std[alive]
        target = pairs.y[:, factor]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=require("sklearn.exceptions", "explicitness").ConvergenceWarning)
            model = linear.LogisticRegression(C=C, max_iter=max_iter).fit(scaled[part.train], target[part.train])
        for figures, rows in ((train_figures, part.train), (per_factor, part.test)):
            chances, areas = model.predict_proba(scaled[rows]), []
            for place, value in enumerate(model.classes_):
                right = target[rows] == value
                if right.all() or not right.any():
                    missing[f"factor {factor}, value {value}"] = "no test row of it, or of any other value"
                else:
                    areas.append(metrics.roc_auc_score(right, chances[:, place]))
            figures[factor] = np.mean(areas) if areas else np.nan
    left_out: dict[str, Any] = {**pairs.left_out, **({"values": missing} if missing else {})}
    choices = {
        "classifier": "multinomial logistic regression",
        "C": C,
        "train_share": train_share,
        "split": "first_rows",
    }
    return Score(
        float(np.nanmean(per_factor)),
        per_factor=tuple(per_factor.tolist()),
        left_out=left_out,
        choices=choices,
        details={"per_factor_train": train_figures},
    )


def sap(
    z: Any, y: Any, kind: str = "discrete", *, variant: str = "disentanglement_lib", seed: int = 0, rows: str = "train"
) -> Score:
    """Separated attribute predictability: how much better the best dimension predicts a factor than the second. 0 to 1.

    ``"discrete"``: the score of a pair is the test accuracy of a linear SVC on that dimension alone, all pairs solved at
    once and exactly. Such a classifier cannot pick out the middle values of a dimension, so a perfect code of factors
    with many values stays near 0.6. ``"continuous"``: the squared correlation.

    Args:
        z: latents ``[N, D]`` of which at least two dimensions vary; constant ones count 0 (continuous) or are left out.
        y: factors ``[N, K]``; constant ones are left out.
        kind: of factors.
        variant: settings of the discrete classifiers, see :data:`SAP_VARIANTS`.
        seed: of the split under ``variant="langspace"``; nothing else is random.
        rows: of the continuous form: ``"train"`` (the first two thirds) or ``"all"``.

    Returns:
        ``details["scores"]``: ``[D, K]``.
    """
    checks.one_of("kind", kind, ("discrete", "continuous"))
    checks.one_of("variant", variant, SAP_VARIANTS)
    checks.one_of("rows", rows, ("train", "all"))
    pairs = checks.pairs(z, y, min_rows=4, min_dims=2, min_factors=1)
    scores = np.full((pairs.z.shape[1], pairs.y.shape[1]), np.nan)
    used_seed = None
    if kind == "continuous":
        cut = len(pairs.z) if rows == "all" else int(len(pairs.z) * 2 / 3 + 1e-9)
        for factor in pairs.factors:
            chosen = pairs.rows(factor)
            chosen = chosen[chosen < cut]
            scores[:, factor] = _squared_correlation(pairs.z[chosen], pairs.given[chosen, factor])
        choices: dict[str, Any] = {"score": "squared correlation", "rows": rows}
    else:
        settings = SAP_VARIANTS[variant]
        choices = {"score": "test accuracy of a linear SVC", "variant": variant, **settings}
        used_seed = seed if settings["split"] == "per_value" else None
        for factor in pairs.factors:
            scores[:, factor] = _accuracies(pairs, factor, settings, seed)
        scores[list(pairs.left_out.get("dimensions", {}))] = -np.inf
    ordered = np.sort(scores[:, pairs.factors], axis=0)
    per_factor = np.full(pairs.y.shape[1], np.nan)
    per_factor[pairs.factors] = ordered[-1] - ordered[-2]
    scores[np.isneginf(scores)] = np.nan
    return Score(
        float(per_factor[pairs.factors].mean()),
        per_factor=tuple(per_factor.tolist()),
        left_out=pairs.left_out,
        choices=choices,
        seed=used_seed,
        details={"scores": scores},
    )


def _accuracies(pairs: checks.Pairs, factor: int, settings: dict[str, Any], seed: int) -> Array:
    share = settings["train_share"]
    by_value = settings["split"] == "per_value"
    part = per_value(pairs, factor, share, seed) if by_value else first_rows(pairs, factor, share)
    target = pairs.y[:, factor]
    model = linear_svc.fit(
        pairs.z[part.train], target[part.train], int(pairs.num_values[factor]),
        C=settings["C"], balanced=settings["class_weight"] == "balanced",
    )  # fmt: skip
    return (model.predict(pairs.z[part.test]) == target[part.test, None]).mean(axis=0)


def _squared_correlation(z: Array, y: Array) -> Array:
    """Of every dimension with y: ``[D]``; 0 where a dimension's variance is below 1e-12."""
    centred, target = z - z.mean(axis=0), y - y.mean()
    variance = centred.var(axis=0, ddof=1)
    covariance = centred.T @ target / (len(y) - 1)
    alive = variance > _LEAST_VARIANCE
    return np.where(alive, covariance**2 / (np.where(alive, variance, 1.0) * target.var(ddof=1)), 0.0)
