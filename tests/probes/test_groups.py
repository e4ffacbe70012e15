"""z-diff and z-min-var: fixed tables exactly, sampled figures within the recorded spread."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lmvae_fast.errors import ConfigError, DataError, LatentError
from lmvae_fast.probes.disentanglement import group_accuracy, majority_vote_accuracy, z_diff, z_min_var
from lmvae_fast.probes.disentanglement.groups import _Draws


@pytest.fixture
def library(record):
    return record("disentanglement/disentanglement_lib.json")["sets"]


@pytest.fixture
def ubisoft(record):
    return record("disentanglement/ubisoft.json")["sets"]


@pytest.mark.parametrize("name", ["perfect", "rotated", "noisy", "dead"])
def test_fixed_tables(arrays, library, name):
    table = arrays(f"disentanglement/{name}_zdiff_table.npz")
    train, test = library[name]["zdiff_fixed_table_train_test_accuracy"]
    learnt = table["X_train"], table["y_train"]
    assert group_accuracy(*learnt, *learnt) == pytest.approx(train, abs=0.01)
    assert group_accuracy(*learnt, table["X_test"], table["y_test"]) == pytest.approx(test, abs=0.01)
    votes = library[name]["zminvar_fixed_votes"]
    tables = votes["train_K_by_D"], votes["eval_K_by_D"]
    assert majority_vote_accuracy(*tables) == pytest.approx(votes["eval_accuracy"], abs=1e-12)
    assert majority_vote_accuracy(tables[0], tables[0]) == pytest.approx(votes["train_accuracy"], abs=1e-12)


@pytest.mark.parametrize("name", ["perfect", "rotated", "noisy", "dependent", "srl"])
def test_sampled_figures(code, library, ubisoft, record, name):
    z, y = code(name)
    difference, least = z_diff(z, y), z_min_var(z, y)
    by_rows = ubisoft[name]
    far, near = (0.06, 0.03) if name == "srl" else (0.02, 0.02)
    assert difference.value == pytest.approx(np.mean(by_rows["z_diff_eval_by_seed"]), abs=far)
    assert least.value == pytest.approx(np.mean(by_rows["z_min_var_eval_by_seed"]), abs=near)
    if library[name]["every_combination_of_factors_present"]:
        by_factors = library[name]
        assert difference.value == pytest.approx(np.mean(by_factors["zdiff_train_eval_by_seed"], axis=0)[1], abs=0.02)
        assert least.value == pytest.approx(np.mean(by_factors["zminvar_train_eval_by_seed"], axis=0)[1], abs=0.02)
        # LangSpace's z-min-var agrees too; it measures no dimension against a group of its own where values abound.
        theirs = record("disentanglement/langspace.json")["sets"][name]["z_min_var_by_seed"]
        assert least.value == pytest.approx(np.mean(theirs, axis=0)[0], abs=0.02)
    for score in (difference, least):
        assert score.seed == 0 and score.spread is not None and len(score.details["per_repetition"]) == 5
        assert score.value == pytest.approx(np.mean(score.details["per_repetition"]))
        assert len(score.per_factor) == y.shape[1] and score.choices["chance"] == 1.0 / y.shape[1]


def test_dead_dimensions_have_no_vote(code, library, ubisoft):
    z, y = code("dead")
    kept = z_min_var(z, y, constant_factors="keep")
    assert kept.value == pytest.approx(np.mean(ubisoft["dead"]["z_min_var_eval_by_seed"]), abs=0.02)
    assert kept.left_out == {
        "dimensions": {3: "standard deviation 0 below 0.05", 4: "standard deviation 0.00098 below 0.05"}
    }
    # A factor that never changes is no factor: its groups' votes are noise and it is left out by default.
    least = z_min_var(z, y)
    assert least.value == 1.0 and least.left_out["factors"] == {3: "one value (0)"} and math.isnan(least.per_factor[3])
    # What is not pruned wins every vote.
    assert np.mean(library["dead"]["zminvar_train_eval_by_seed"]) < 0.3
    assert z_diff(z, y).value == pytest.approx(1.0, abs=0.02)
    assert z_diff(z, y, constant_factors="keep").value == pytest.approx(1.0, abs=0.02)


def test_draws_share_a_value_and_never_pair_a_row_with_itself():
    column = np.array([0, 1, 1, -1, 2, 2, 2, 0, 0, 3, -1])
    draws = _Draws(column, 4)
    assert draws.rare == {3: "1 row"}
    first, second = draws.row_pairs(np.random.default_rng(0), 4000)
    assert (column[first] == column[second]).all() and (first != second).all() and (column[first] >= 0).all()
    # Each value is drawn evenly, and each of its rows as well.
    np.testing.assert_allclose(np.bincount(column[first], minlength=3) / 4000, 1 / 3, atol=0.03)
    for rows in draws.groups(np.random.default_rng(0), 50, 8):
        assert len(set(column[rows])) == 1
        assert np.ptp(np.bincount(rows)[np.unique(rows)]) <= 1  # whole rounds, then different rows


def test_values_met_once_and_factors_of_such_values_are_named():
    source = np.random.default_rng(0)
    z = source.normal(size=(40, 3))
    y = np.stack([np.arange(40) % 2, np.arange(40) % 5, np.arange(40)], axis=1)
    y[0, 0] = 7
    score = z_min_var(z, y, repetitions=1, num_train=20, num_test=20)
    assert score.left_out["factors"] == {2: "no value is met twice"} and score.spread is None
    assert score.left_out["values"]["factor 0, value 2"] == "one row"


def test_refusals(code):
    z, y = code("perfect")
    with pytest.raises(DataError, match="too few factors vary"):
        z_diff(z, y[:, :1])
    with pytest.raises(DataError, match="that two rows share"):
        z_diff(z[:9], np.stack([np.arange(9), np.arange(9) // 3], axis=1))
    with pytest.raises(LatentError, match="no dimension varies enough"):
        z_min_var(z * 1e-3, y)
    with pytest.raises(ConfigError, match="group is out of range"):
        z_diff(z, y, group=1)
    with pytest.raises(ConfigError, match="seed is out of range"):
        z_min_var(z, y, seed=-1)
    with pytest.raises(DataError, match="two tables"):
        majority_vote_accuracy(np.zeros((2, 3)), np.zeros((2, 3)))
