"""Optimal transport, smoothness, walks and neighbourhoods against gensim's, POT's and LangSpace's records."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lmvae_fast.data.word_vectors import Lookup, WordVectors
from lmvae_fast.errors import ConfigError, DataError, LatentError, MissingPackageError
from lmvae_fast.probes import geometry
from lmvae_fast.probes.optional import require

pytest.importorskip("ot", reason="POT is not installed")

NEAR = 1e-6


@pytest.fixture(scope="module")
def words(arrays):
    file = arrays("interpolation/wmd_vectors.npz")
    return dict(zip(file["words"].tolist(), file["vectors"], strict=True))


@pytest.mark.parametrize("solver", ["gensim", "pot"])
@pytest.mark.parametrize("scale", ["raw", "norm"])
@pytest.mark.parametrize("kept", ["all", "nostop"])
def test_smoothness_of_recorded_paths(record, words, solver, scale, kept):
    recorded = record("interpolation/wmd_paths.json")
    options = {"stop_words": recorded["stop_words"] if kept == "nostop" else (), "unit": scale == "norm"}
    for path in recorded["paths"]:
        want = path[f"{kept}_{solver}_{scale}"]
        found = geometry.interpolation_smoothness(path["sentences"], words, **options)
        assert found.details["end_to_end"] == pytest.approx(want["end_to_end"], abs=NEAR)
        np.testing.assert_allclose(found.details["steps"], [float(step) for step in want["steps"]], rtol=0, atol=NEAR)
        if len(set(path["sentences"])) == 1:
            assert found.value == 1.0  # theirs: 0/0, or rounding over rounding
        else:
            assert found.value == pytest.approx(want["IS"], abs=NEAR)
        assert found.choices["T"] == len(path["sentences"]) - 1
        first = geometry.word_movers_distance(*path["sentences"][:2], words, **options)
        assert first == pytest.approx(float(want["steps"][0]), abs=NEAR)


def test_clouds(record, arrays):
    clouds = arrays("interpolation/ot_clouds.npz")
    for number, want in enumerate(record("interpolation/ot_clouds.json")["values"]):
        a, b, mass = clouds[f"A{number}"], clouds[f"B{number}"], (clouds[f"a{number}"], clouds[f"b{number}"])
        assert [len(a), len(b), a.shape[1]] == want["shape"]
        found = {
            "emd2_euclidean_weights": geometry.transport_cost(a, b, *mass),
            "emd2_euclidean_uniform": geometry.transport_cost(a, b),
            "emd2_sqeuclidean_weights": geometry.transport_cost(a, b, *mass, cost="sqeuclidean"),
            "relaxed_wmd_max_of_both_sides": geometry.transport_cost(a, b, *mass, method="relaxed"),
            "sinkhorn_reg0.1_times_mean_cost": geometry.transport_cost(a, b, *mass, method="sinkhorn"),
        }
        for name, value in found.items():
            assert value == pytest.approx(want[name], rel=NEAR, abs=NEAR), name


def test_distance_is_a_metric_with_closed_forms():
    line = {"a": [0.0, 0.0], "b": [3.0, 4.0], "c": [6.0, 8.0]}
    assert geometry.word_movers_distance("a", "b", line) == pytest.approx(5.0)
    assert geometry.word_movers_distance("a a b", "a b b", line) == pytest.approx(5.0 / 3.0)
    assert geometry.word_movers_distance("A b", ["b", "a"], line) == 0.0
    assert geometry.word_movers_distance('"b," (a)', "a b!", line) == 0.0  # punctuation around a word does not hide it
    assert math.isinf(geometry.word_movers_distance("a", "x y", line)) and math.isinf(
        geometry.word_movers_distance("", "", line)
    )
    straight = geometry.interpolation_smoothness(["a", "b", "c"], line)
    assert straight.value == pytest.approx(1.0) and straight <= 1.0
    detour = geometry.interpolation_smoothness(["a", "c", "b"], line)
    assert detour.value == pytest.approx(5.0 / 15.0)
    hidden = geometry.interpolation_smoothness(["a", "x", "b"], line)
    assert hidden.value == 0.0 and hidden.left_out == {"points": {1: "no word with a vector"}}


def test_walks_sums_and_lines_are_those_of_langspace(golden, record):
    recorded, settings = load_file(golden / "ops/langspace_ops.safetensors"), record("ops/langspace_ops.json")
    mu, logvar, z, target = (recorded[name] for name in ("mu", "logvar", "z", "target"))
    options = {"dims": settings["dims"], "points": settings["sample_size"]}
    moved, distances = geometry.quantile_walk(z, mu, np.exp(logvar / 2), **options)
    np.testing.assert_allclose(moved, recorded["walk_logvar"], rtol=0, atol=NEAR)
    np.testing.assert_allclose(distances, recorded["distance_logvar"], rtol=0, atol=NEAR)
    # As released, the deviation goes where a log-variance is read: the scale is exp(std / 2), never below 1.
    released, _ = geometry.quantile_walk(z, mu, np.exp(np.exp(logvar / 2) / 2), **options)
    np.testing.assert_allclose(released, recorded["walk_as_released"], rtol=0, atol=NEAR)
    for size in (10, 4):
        np.testing.assert_allclose(
            geometry.line(z, target, size + 1), recorded[f"interpolation_size{size}"], rtol=0, atol=NEAR
        )
    sums = geometry.arithmetic(z, target)
    for ours, theirs in (("sum", "sum"), ("difference", "sub"), ("mean", "avg")):
        np.testing.assert_allclose(sums[ours], recorded[theirs], rtol=0, atol=NEAR)


def test_neighbourhoods():
    blobs = np.concatenate(
        [np.random.default_rng(0).normal(size=(30, 4)), np.random.default_rng(1).normal(size=(30, 4)) + 50]
    )
    labels = np.repeat(["left", "right"], 30)
    near = geometry.neighbours(blobs, 5)
    assert near.shape == (60, 5) and all(row not in near[row] for row in range(60))
    agreement = geometry.neighbour_agreement(blobs, labels)
    assert (
        agreement.value == 1.0 and agreement.choices["chance"] == 0.5 and agreement.details["per_label"]["left"] == 1.0
    )
    mixed = geometry.neighbour_agreement(np.random.default_rng(2).normal(size=(600, 3)), np.arange(600) % 2)
    assert mixed.value == pytest.approx(0.5, abs=0.05)
    assert geometry.neighbour_overlap(blobs, 3.0 * blobs).value == 1.0
    source = np.random.default_rng(3)
    unrelated = geometry.neighbour_overlap(source.normal(size=(500, 8)), source.normal(size=(500, 8)), k=10)
    assert unrelated.value == pytest.approx(unrelated.choices["chance"], abs=0.01)


def test_invertibility():
    x = torch.randn(20, 4, dtype=torch.float64)
    assert geometry.inversion_error(torch.exp, torch.log, x).value < 1e-12
    assert geometry.inversion_error(lambda v: (v + 1.0, 0.0), lambda v: v - 1.5, x).details["mean"] > 0.1
    ratio = geometry.invertibility_ratio(["a cat", "a dog", "a bear"], ["a cat", "a cow", "a bear"])
    assert ratio.value == pytest.approx(2 / 3) and ratio.details["same"] == [True, False, True]


def test_sources_of_vectors(words):
    table = WordVectors(list(words), np.stack(list(words.values())), lowercase=True)
    path = ["the trunk", "The (trunk) above", "an animal"]
    known = geometry.KnownWords(table)
    assert geometry.interpolation_smoothness(path, known) == geometry.interpolation_smoothness(path, words)
    assert known.name == "memory"

    class AnyWord:
        """A source that makes a vector of any word, as an encoder does."""

        source, asked = "encoder", []

        def lookup(self, words, *, missing="error"):
            self.asked += words
            vectors = np.array([[float(len(word)), 1.0] for word in words], dtype=np.float32)
            return Lookup(vectors, list(range(len(words))), [], 0)

    known = geometry.KnownWords(AnyWord())
    found = geometry.interpolation_smoothness(["a bear.", "a bears", "a bear"], known)
    assert found.value == 0.0 and found.details["steps"] == [0.5, 0.5]  # the full stop is no part of a word
    assert AnyWord.asked == ["a", "bear", "bears"] and found.choices["vectors"] == "encoder"  # each is asked for once


def test_refusals(words):
    with pytest.raises(DataError, match="mapping of words to vectors"):
        geometry.word_movers_distance("a", "b", [1.0, 2.0])
    with pytest.raises(LatentError, match="vectors is not finite"):
        geometry.word_movers_distance("a", "b", {"a": [1.0], "b": [float("inf")]})
    with pytest.raises(DataError, match="an end of the interpolation"):
        geometry.interpolation_smoothness(["zzxqv", "the trunk"], words)
    with pytest.raises(DataError, match="has two ends"):
        geometry.interpolation_smoothness(["the trunk"], words)
    with pytest.raises(DataError, match="weights_a must be 2 numbers"):
        geometry.transport_cost(np.eye(2), np.eye(2), [1.0, -1.0])
    with pytest.raises(DataError, match="one width"):
        geometry.transport_cost(np.eye(2), np.eye(3))
    with pytest.raises(ConfigError, match="unknown method"):
        geometry.transport_cost(np.eye(2), np.eye(2), method="greedy")
    with pytest.raises(LatentError, match="no such latent dimension"):
        geometry.quantile_walk(np.eye(2), np.eye(2), np.eye(2), dims=[2])
    with pytest.raises(LatentError, match="standard deviation is negative"):
        geometry.quantile_walk(np.eye(2), np.eye(2), -np.eye(2))
    with pytest.raises(LatentError, match="one shape"):
        geometry.line(np.eye(2), np.eye(3))
    with pytest.raises(ConfigError, match="k is out of range"):
        geometry.neighbours(np.eye(3), 3)
    with pytest.raises(DataError, match="equally many"):
        geometry.invertibility_ratio(["a"], [])
    with pytest.raises(MissingPackageError, match=r"a test needs no_such_package\.part"):
        require("no_such_package.part", "a test")
