"""MI matrix, MIG and modularity against three public implementations, closed forms and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lmvae_fast.errors import ConfigError, DataError, LatentError
from lmvae_fast.probes.disentanglement import mig, modularity, mutual_information
from lmvae_fast.probes.disentanglement.information import equal_width_bins

SETS = ("perfect", "rotated", "noisy", "dead", "dependent", "srl", "srl_384")
EXACT = 1e-9


@pytest.fixture
def library(record):
    return record("disentanglement/disentanglement_lib.json")["sets"]


@pytest.mark.parametrize("bins", [10, 20])
@pytest.mark.parametrize("name", SETS)
def test_matrix_equals_disentanglement_lib(code, library, name, bins):
    z, y = code(name)
    found = mutual_information(z, y, bins)
    np.testing.assert_allclose(found.value, library[name][f"mi_bins{bins}"], rtol=0, atol=EXACT)
    assert modularity(found.value).value == pytest.approx(library[name][f"modularity_bins{bins}"], abs=EXACT)
    if name != "dead":  # a constant factor makes theirs NaN
        assert mig(z, y, bins).value == pytest.approx(library[name][f"mig_bins{bins}"], abs=EXACT)
        assert modularity(found).value == pytest.approx(library[name][f"modularity_bins{bins}"], abs=EXACT)


def test_modularity_of_given_matrices(record):
    for case in record("disentanglement/formulas_on_given_matrices.json")["cases"]:
        assert modularity(np.array(case["mi_D_by_K"])).value == pytest.approx(case["modularity"], abs=EXACT)


@pytest.mark.parametrize("name", ["perfect", "rotated", "noisy", "dependent", "srl"])
def test_other_implementations(code, record, name):
    z, y = code(name)
    ubisoft = record("disentanglement/ubisoft.json")["sets"][name]
    for bins in (10, 20):
        found = mutual_information(z, y, bins)
        assert modularity(found).value == pytest.approx(ubisoft[f"modularity_bins{bins}"], abs=EXACT)
        # Theirs is divided by the entropy of the code before it is sorted: not the published MIG, but our matrix gives it.
        share = -np.sort(-found.value / found.dimension_entropy[:, None], axis=0)
        assert (share[0] - share[1]).mean() == pytest.approx(ubisoft[f"mig_bins{bins}"], abs=EXACT)
    langspace = record("disentanglement/langspace.json")["sets"][name]
    matrix = np.array(langspace["mutual_information_K_by_D_nats"]).T
    np.testing.assert_allclose(with_float32_edges(z, y), matrix, rtol=0, atol=5e-6)
    figures = np.array(mig(z, y).per_factor)
    mean, std = langspace["MIG_mean_std_over_factors"]
    assert figures.mean() == pytest.approx(mean, abs=2e-4)
    assert figures.std(ddof=1) == pytest.approx(std, abs=1e-3)


def with_float32_edges(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """H(z) - H(z|y) with LangSpace's bins: edges rounded to float32, a few rows fall beside them and are dropped."""

    def entropy(bins):
        share = np.bincount(bins[bins < 20], minlength=20)
        share = share[share > 0] / max(1, share.sum())
        return -(share * np.log(share)).sum()

    found = np.empty((z.shape[1], y.shape[1]))
    for dim in range(z.shape[1]):
        x = z[:, dim]
        edges = x.min() + np.arange(21, dtype=np.float32) * (x.max() - x.min()) / np.float32(20)
        bins = np.searchsorted(edges, x, side="right") - 1
        bins[x == edges[20]] = 19
        for factor in range(y.shape[1]):
            values = [y[:, factor] == value for value in np.unique(y[:, factor])]
            found[dim, factor] = entropy(bins) - sum(rows.mean() * entropy(bins[rows]) for rows in values)
    return found


def test_constant_factors_and_dead_dimensions_are_named(code, record):
    z, y = code("dead")
    want = record("disentanglement/formulas_on_given_matrices.json")["dead_without_constant_factor"]
    found = mutual_information(z, y)
    assert found.left_out == {"factors": {3: "one value (0)"}, "dimensions": {3: "constant"}}
    np.testing.assert_allclose(found.value[:, :3], want["mi_bins20"], rtol=0, atol=EXACT)
    np.testing.assert_allclose(found.factor_entropy[:3], want["entropy"], rtol=0, atol=EXACT)
    gap = mig(z, y)
    assert gap.value == pytest.approx(want["mig"], abs=EXACT)
    np.testing.assert_allclose(gap.per_factor[:3], want["mig_per_factor"], rtol=0, atol=EXACT)
    assert math.isnan(gap.per_factor[3])
    assert modularity(found).value == pytest.approx(want["modularity"], abs=EXACT)
    assert modularity(found).left_out["dimensions"] == {3: "no information: counts 0"}
    # Seven dimensions, one of which counted 0.
    without = modularity(found, without_information="leave_out")
    assert without.value == pytest.approx(want["modularity"] * 7 / 6, abs=EXACT)
    assert without.left_out["dimensions"] == {3: "no information"}


def test_per_factor_gaps_and_code_entropies(code, record):
    for name, want in record("disentanglement/formulas_on_given_matrices.json")["mig_detail_bins20"].items():
        z, y = code(name)
        np.testing.assert_allclose(mig(z, y).per_factor, want["mig_per_factor"], rtol=0, atol=EXACT)
        entropies = mutual_information(z, y).dimension_entropy
        np.testing.assert_allclose(entropies, want["code_entropy_nats"], rtol=0, atol=EXACT)


def test_bins_are_those_of_a_histogram():
    source = np.random.default_rng(0)
    z = np.concatenate([source.normal(size=(997, 6)), source.integers(0, 5, size=(997, 3)), np.zeros((997, 1))], axis=1)
    z[:, 1] *= 1e-8
    z[:, 2] += 1e6
    for bins in (2, 7, 20, 64):
        found = equal_width_bins(z, bins)
        for dim in range(9):
            edges = np.linspace(z[:, dim].min(), z[:, dim].max(), bins + 1)
            np.testing.assert_array_equal(found[:, dim], np.digitize(z[:, dim], edges[:-1]) - 1)
        assert not found[:, 9].any()


def test_rows_without_a_factor_do_not_count_for_it():
    source = np.random.default_rng(1)
    z, y = source.normal(size=(400, 3)), source.integers(0, 4, size=(400, 2))
    z[:, 0] += y[:, 0]
    # The bins lie between the extremes of all rows: let rows that have the factor hold them.
    missing = (source.random(400) < 0.3) & (z > z.min(axis=0)).all(axis=1) & (z < z.max(axis=0)).all(axis=1)
    partly = y.copy()
    partly[missing, 0] = -1
    part = mutual_information(z, partly).value
    np.testing.assert_array_equal(part[:, 1], mutual_information(z, y).value[:, 1])
    alone = mutual_information(z[~missing], y[~missing]).value
    np.testing.assert_allclose(part[:, 0], alone[:, 0], rtol=0, atol=EXACT)


def test_large_tables_are_taken_in_parts(monkeypatch, code):
    z, y = code("srl")
    whole = mutual_information(z, y).value
    monkeypatch.setattr("lmvae_fast.probes.disentanglement.information._BLOCK", 100)
    np.testing.assert_array_equal(mutual_information(z, y).value, whole)


def test_result_stands_for_its_array():
    z, y = torch.randn(50, 3), torch.randint(0, 3, (50, 2))
    found = mutual_information(z, y)
    assert np.asarray(found).shape == found.shape == (3, 2) and np.log(np.array(found) + 1.0).shape == (3, 2)
    assert found[1, 1] == found.value[1, 1] and found.to_dict()["choices"]["bins"] == 20
    gap = mig(z, y)
    assert gap == gap.value and float(gap) == gap.value and gap.to_dict()["per_factor"] == list(gap.per_factor)


def test_refusals():
    z, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20)[:, None] % 4
    broken = z.copy()
    broken[7, 2] = np.nan
    with pytest.raises(LatentError, match="nan at row 7, dimension 2"):
        mutual_information(broken, y)
    with pytest.raises(LatentError, match="too few rows"):
        mutual_information(z[:1], y[:1])
    with pytest.raises(LatentError, match="matrix of numbers"):
        mutual_information(z[0], y)
    with pytest.raises(DataError, match="one row of values for each latent"):
        mutual_information(z, y[:19])
    with pytest.raises(DataError, match="whole numbers"):
        mutual_information(z, y + 0.5)
    with pytest.raises(ConfigError, match="bins is out of range"):
        mutual_information(z, y, bins=1)
    with pytest.raises(ConfigError, match="unknown normalise"):
        mig(z, y, normalise="code")
    with pytest.raises(DataError, match="too few factors vary"):
        mig(z, np.zeros((20, 2), dtype=int))
    with pytest.raises(LatentError, match="too few dimensions vary"):
        mig(np.concatenate([z[:, :1], np.ones((20, 2))], axis=1), y)
    with pytest.raises(DataError, match="compares factors"):
        modularity(mutual_information(z, y))
    with pytest.raises(DataError, match="never negative"):
        modularity(np.array([[0.1, -0.2], [0.1, 0.2]]))
