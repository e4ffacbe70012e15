"""Cluster separation and projections against scikit-learn's records."""

from __future__ import annotations

import numpy as np
import pytest

from lmvae_fast.errors import ConfigError, DataError, LatentError
from lmvae_fast.probes import clusters
from lmvae_fast.probes.projections import project

NEAR = 1e-6


@pytest.fixture(params=["srl", "blobs"])
def labelled(request, arrays, record):
    file = arrays("cluster/clusters.npz")
    # scikit-learn keeps the input's float32.
    return file[f"{request.param}_x"], file[f"{request.param}_y"], record("cluster/clusters.json")[request.param]


def test_recorded_figures(labelled):
    x, y, want = labelled
    near = clusters.silhouette(x, y)
    assert near.value == pytest.approx(want["silhouette_euclidean"], abs=NEAR)
    assert clusters.silhouette(x, y, metric="cosine").value == pytest.approx(want["silhouette_cosine"], abs=NEAR)
    np.testing.assert_allclose(
        list(near.details["per_class"].values()), want["silhouette_per_class"], rtol=0, atol=NEAR
    )
    assert clusters.calinski_harabasz(x, y).value == pytest.approx(want["calinski_harabasz"], rel=NEAR)
    assert clusters.davies_bouldin(x, y).value == pytest.approx(want["davies_bouldin"], abs=NEAR)
    middles = clusters.centroids(x, y)
    np.testing.assert_allclose(middles["distances"], want["centroid_distances"], rtol=0, atol=2 * NEAR)
    np.testing.assert_allclose(middles["spread"], want["rms_spread_per_class"], rtol=0, atol=NEAR)
    assert clusters.knn_accuracy(x, y).value == pytest.approx(want["knn5_leave_one_out_accuracy"], abs=NEAR)


def test_kmeans(labelled):
    x, y, want = labelled
    found = clusters.kmeans_agreement(x, y)
    for name, score in found.items():
        recorded = [row[name] for row in want["kmeans_by_seed"]]
        assert max(score.details["per_seed"]) == pytest.approx(max(recorded), abs=NEAR), name
        assert score.spread is not None and score.value == pytest.approx(np.mean(score.details["per_seed"]))
    assert set(clusters.separation(x, y, seeds=(0,))) == {
        *found,
        "silhouette",
        "calinski_harabasz",
        "davies_bouldin",
        "knn",
    }


def test_principal_components(labelled):
    x, _, want = labelled
    found = project(x)
    np.testing.assert_allclose(found.details["explained"], want["pca_explained_variance_ratio"], rtol=0, atol=NEAR)
    signs = np.sign((found.details["directions"] * want["pca_components_up_to_sign"]).sum(axis=1))
    recorded = np.array(want["pca_components_up_to_sign"]) * signs[:, None]
    np.testing.assert_allclose(found.details["directions"], recorded, rtol=0, atol=5 * NEAR)
    np.testing.assert_allclose(found.points[:10], want["pca_first10_points_up_to_sign"] * signs, rtol=0, atol=5 * NEAR)
    assert found.value == pytest.approx(want["trustworthiness_pca2_k5"], abs=NEAR)
    assert project(x, neighbours=12).value == pytest.approx(want["trustworthiness_pca2_k12"], abs=NEAR)
    scaled = project(x, standardise=True).details["explained"]
    np.testing.assert_allclose(scaled, want["pca_standardised_explained_variance_ratio"], rtol=0, atol=NEAR)


def test_neighbour_embedding(labelled):
    x, y, want = labelled
    found = project(x, "tsne", perplexity=20.0, iterations=300, exact=True)
    recorded = want["tsne_exact_perplexity20_init_pca_300_iterations_by_seed"][0]
    assert found.value == pytest.approx(recorded["trustworthiness_k5"], abs=0.03)
    assert found.details["kl"] == pytest.approx(recorded["kl"], rel=0.1)
    assert clusters.silhouette(found.points, y).value == pytest.approx(recorded["silhouette"], abs=0.1)


@pytest.mark.slow
def test_umap_keeps_neighbourhoods_of_the_whole_latent(arrays):
    pytest.importorskip("umap", reason="umap-learn is not installed")
    file = arrays("cluster/clusters.npz")
    found = project(file["srl_x"], "umap", seed=1)
    assert found.value > project(file["srl_x"]).value and found.seed == 1
    assert found.to_dict()["points"] == found.points.tolist()


def test_pictures_use_every_dimension():
    """Eight groups at the corners of a simplex need seven dimensions: two components cannot keep them apart."""
    groups = np.repeat(np.arange(8), 12)
    x = np.eye(8)[groups] * 4.0 + np.random.default_rng(0).normal(size=(96, 8)) * 0.4
    assert clusters.knn_accuracy(project(x).points, groups).value < 0.8
    assert clusters.knn_accuracy(project(x, "tsne", iterations=300, perplexity=10.0).points, groups).value > 0.95


def test_refusals(arrays):
    x = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(DataError, match="at least two and fewer than rows"):
        clusters.silhouette(x, np.zeros(20))
    with pytest.raises(DataError, match="at least two and fewer than rows"):
        clusters.calinski_harabasz(x, np.arange(20))
    with pytest.raises(DataError, match="one value for each row"):
        clusters.davies_bouldin(x, np.zeros(3))
    with pytest.raises(DataError, match="needs a seed"):
        clusters.kmeans_agreement(x, np.arange(20) % 2, seeds=())
    with pytest.raises(ConfigError, match="unknown method"):
        project(x, "mds")
    with pytest.raises(ConfigError, match="unknown option of pca"):
        project(x, "pca", perplexity=3)
    with pytest.raises(LatentError, match="all rows are equal"):
        project(np.ones((5, 3)))
    with pytest.raises(LatentError, match="too few rows"):
        project(x[:3])
