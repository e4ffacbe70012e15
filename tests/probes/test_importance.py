"""DCI: exact formulas on given matrices, and end to end with trees."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.ensemble import GradientBoostingClassifier

from lmvae_fast.errors import ConfigError, DataError, LatentError
from lmvae_fast.probes.disentanglement import dci, dci_from_importance


def test_formulas_on_given_matrices(record):
    cases = record("disentanglement/formulas_on_given_matrices.json")["cases"]
    for case in cases:
        found = dci_from_importance(case["importance_D_by_K"])
        # Theirs adds 1e-11 inside the entropies.
        assert found.disentanglement == pytest.approx(case["disentanglement"], abs=1e-8)
        assert found.completeness == pytest.approx(case["completeness"], abs=1e-8)
        np.testing.assert_allclose(found.details["per_dimension"], case["disentanglement_per_code"], atol=1e-8)
        np.testing.assert_allclose(found.per_factor, case["completeness_per_factor"], atol=1e-8)
    assert dci_from_importance(np.zeros((3, 2))).left_out["dimensions"].keys() == {0, 1, 2}


def test_weightings_differ_where_a_factor_has_more_mass():
    importance = np.array([[9.0, 0.5], [0.0, 0.5]])
    # First factor: one dimension, complete; second: evenly spread, not at all.
    assert dci_from_importance(importance).completeness == pytest.approx(0.9)
    assert dci_from_importance(importance, completeness_weights="mean").completeness == pytest.approx(0.5)


def test_closed_forms():
    assert dci_from_importance(np.eye(4)).value == 1.0 and dci_from_importance(np.ones((4, 3))).value == pytest.approx(
        0.0
    )
    single = dci_from_importance([[1.0], [0.0]])
    assert math.isnan(single.disentanglement) and single.completeness == 1.0
    one_dimension = dci_from_importance([[1.0, 1.0]])
    assert math.isnan(one_dimension.completeness) and one_dimension.disentanglement == 0.0


def test_gradient_boosting_is_that_of_scikit_learn(code):
    z, y = code("noisy")
    found = dci(z, y[:, :2], trees=4, max_rows=600, seed=5)
    together = dci(z, y[:, :2], trees=4, max_rows=600, seed=5, jobs=2)
    np.testing.assert_array_equal(found.details["importance"], together.details["importance"])
    rows = np.sort(np.random.default_rng(5).choice(2000, size=600, replace=False))
    for factor in range(2):
        model = GradientBoostingClassifier(n_estimators=4, random_state=5).fit(z[rows].astype(float), y[rows, factor])
        np.testing.assert_allclose(
            found.details["importance"][:, factor], model.feature_importances_, rtol=0, atol=1e-12
        )
        assert found.details["accuracy_test"][factor] == model.score(z[2000:].astype(float), y[2000:, factor])
    assert found.informativeness == pytest.approx(found.details["accuracy_test"].mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["perfect", "rotated", "noisy", "dependent", "srl"])
def test_gradient_boosting_equals_disentanglement_lib(code, record, name):
    z, y = code(name)
    rounds = np.array(
        record("disentanglement/disentanglement_lib.json")["sets"][name]["dci_gbt_D_C_Itrain_Itest_by_seed"]
    )
    found = dci(z, y)
    figures = [found.disentanglement, found.completeness, found.informativeness_train, found.informativeness]
    np.testing.assert_allclose(figures, rounds.mean(axis=0), atol=5e-3)


@pytest.mark.parametrize("name", ["perfect", "rotated", "noisy", "dependent", "srl"])
def test_forest_lies_where_langspace_lies(code, record, name):
    z, y = code(name)
    want = record("disentanglement/langspace.json")["sets"][name]["DCI_mean_std_over_factors_by_seed"]
    options = {"trees": 10, "split": "per_value", "train_share": 0.8, "completeness_weights": "mean"}
    seeds = [dci(z, y, "forest", seed=seed, **options) for seed in range(3)]
    for figure in ("completeness", "informativeness"):
        recorded = np.array(want[figure])[:, 0]
        spread = max(recorded.std(ddof=1), 2e-3)
        found = np.mean([getattr(score, figure) for score in seeds])
        assert abs(found - recorded.mean()) < 3 * spread, figure


def test_constant_factors_and_absent_values(code):
    z, y = code("dead")
    found = dci(z, y, "forest", trees=5)
    assert found.left_out["factors"] == {3: "one value (0)"} and found.left_out["dimensions"][3] == "constant"
    assert math.isnan(found.per_factor[3]) and found.details["importance"].shape == (7, 4)
    partly = np.where(np.arange(len(y))[:, None] % 3 == 0, -1, y)
    assert dci(z, partly, "forest", trees=5).informativeness > 0.8


def test_seed_and_row_limit(code):
    z, y = code("noisy")
    first = dci(z, y, "forest", seed=3, trees=5, max_rows=500)
    assert (
        first
        == dci(z, y, "forest", seed=3, trees=5, max_rows=500)
        != dci(z, y, "forest", seed=4, trees=5, max_rows=500)
    )
    assert first.choices["max_rows"] == 500


def test_refusals(code):
    z, y = code("perfect")
    with pytest.raises(DataError, match="an importance is negative"):
        dci_from_importance([[1.0, -0.1]])
    with pytest.raises(LatentError, match="R is not finite"):
        dci_from_importance([[1.0, float("nan")]])
    with pytest.raises(ConfigError, match="unknown estimator"):
        dci(z, y, "lasso")
    with pytest.raises(ConfigError, match="max_rows"):
        dci(z, y, "forest", max_rows=1)
    with pytest.raises(DataError, match="too few factors vary"):
        dci(z, np.zeros(len(z), dtype=int))
