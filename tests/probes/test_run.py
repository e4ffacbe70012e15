"""All probes of a model: what is run, skipped and refused; encodings and their cache; reports compared."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.data import SentenceDataset, generate_corpus
from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.probes import factors
from lmvae_fast.probes.bootstrap import paired_difference, replicates_of_mean, resamples
from lmvae_fast.probes.compare import compare
from lmvae_fast.probes.encodings import encode
from lmvae_fast.probes.run import PROBES, read_report
from tests.probes.tiny import SETTINGS, tiny_model

QUICK = ("overview", "neighbourhoods", "reconstruction")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def data():
    return generate_corpus(240)


@pytest.fixture(scope="module")
def report(model, data):
    model.train()
    found = lf.probe(model, data, name="tiny", **SETTINGS)
    assert model.training  # as it was before
    return found


def test_every_probe_that_the_data_allow(report, data):
    assert set(report.sections) == set(PROBES) - {"sts", "linguistic"}
    assert "--sts" in report.skipped["sts"] and "--linguistic" in report.skipped["linguistic"]
    assert (
        report.data["sentences"] == 240 and report.settings["latents"] == "means" and report.settings["latent_dim"] == 6
    )
    figures = report["disentanglement"].scores
    assert {
        "mig",
        "modularity",
        "explicitness",
        "sap",
        "sap_continuous",
        "dci_completeness",
        "z_diff",
        "z_min_var",
    } <= set(figures)
    assert all(np.isfinite(float(score)) for section in report.sections.values() for score in section.scores.values())
    assert figures["z_diff"].spread is not None and figures["z_diff"].seed == 0
    # Factors with hundreds of values are not classified, and are named.
    assert (
        "object" in report["disentanglement"].left_out and "negation" in report["disentanglement"].pictures["factors"]
    )
    assert len(next(iter(report["interpolation"].tables.values())).rows) == 4
    with pytest.raises(KeyError, match="STS needs sentence pairs"):
        report["sts"]


def test_json_of_a_report(report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report.to_dict(), allow_nan=False))
    back = read_report(path)
    assert back["sections"]["disentanglement"]["scores"]["mig"]["value"] == report["disentanglement"]["mig"].value
    path.write_text("{}")
    with pytest.raises(DataError, match="is no probe report"):
        read_report(path)
    with pytest.raises(DataError, match="there is no file"):
        read_report(tmp_path / "none.json")


def test_same_seed_same_report(report, model, data):
    again = lf.probe(model, data, name="tiny", **SETTINGS).to_dict()
    first = report.to_dict()
    for found in (again, first):
        found.pop("seconds")
    assert json.dumps(first) == json.dumps(again)


def test_samples_are_seeded(model, data):
    options = {**SETTINGS, "probes": ["overview"], "latents": "samples"}
    drawn = [lf.probe(model, data, **options, seed=seed)["overview"]["effective_dimensions"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    means = lf.probe(model, data, **{**options, "latents": "means"})["overview"]["effective_dimensions"]
    assert means != drawn[0]


def test_factors_of_labels_and_of_tables(model, data):
    labelled = SentenceDataset(data.texts, data.labels)
    options = {**SETTINGS, "probes": ["disentanglement"]}
    found = lf.probe(model, labelled, **options)["disentanglement"]
    assert "core_roles" in found.pictures["factors"] and "ARG1" in found.pictures["factors"]
    table = factors.table({"length": [min(len(text.split()), 9) for text in data.texts], "other": [None] * 240})
    own = lf.probe(
        model, data, factors=table.select(["length"]).beside(factors.generative(data, ["negation"])), **options
    )
    assert own["disentanglement"].pictures["factors"] == ["length", "negation"]
    with pytest.raises(DataError, match="factors and sentences differ in number"):
        lf.probe(model, data, factors=table.rows(slice(5)), **options)
    with pytest.raises(DataError, match="neither generative factors nor role labels"):
        lf.probe(model, data.texts, **options)


def test_tasks(model, data, shared, tmp_path):
    pairs = tmp_path / "pairs.csv"
    lines = (shared / "data" / "stsb_en_dev.csv").read_text().splitlines()[:60]
    pairs.write_text("\n".join(lines))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("subj_number", "past_present"):
        rows = (shared / "data" / "probing" / f"{name}.txt").read_text().splitlines()
        kept = [row for part in ("tr", "va", "te") for row in [r for r in rows if r.startswith(part)][:40]]
        (folder / f"{name}.txt").write_text("\n".join(kept))
    options = {**SETTINGS, "probes": ["sts", "linguistic"], "sts": pairs, "linguistic": folder}
    found = lf.probe(model, data, **options, cache=tmp_path / "cache")
    assert -100.0 <= found["sts"]["spearman_latent"] <= 100.0 and len(found["sts"].replicates["spearman_encoder"]) == 12
    assert found["linguistic"].pictures["tasks"] == ["past_present", "subj_number"]
    assert found["linguistic"]["mean: encoder"] == pytest.approx(
        np.mean([found["linguistic"][f"{name}: encoder"] for name in ("past_present", "subj_number")])
    )
    assert len(list((tmp_path / "cache").glob("encodings-*"))) == 4  # the data, the pairs and two tasks


def test_encodings_are_kept_by_content(model, data, tmp_path, monkeypatch):
    first = encode(model, list(data[:30]), cache=tmp_path)
    whole = model.encode(data.texts[:30])
    torch.testing.assert_close(first.mu, whole.mu, rtol=0, atol=1e-5)
    calls = []
    monkeypatch.setattr(type(model), "pool", lambda *arguments, **options: calls.append(1))
    again = encode(model, list(data[:30]), cache=tmp_path)
    assert not calls and torch.equal(first.mu, again.mu) and torch.equal(first.pooled, again.pooled)
    monkeypatch.undo()
    other = tiny_model(seed=1)
    assert not torch.equal(encode(other, list(data[:30]), cache=tmp_path).mu, first.mu)
    encode(model, list(data[:29]), cache=tmp_path)
    assert len(list(tmp_path.glob("encodings-*"))) == 3


def test_bootstrap():
    drawn = list(resamples(5, 3, seed=1))
    assert [row.tolist() for row in drawn] == [row.tolist() for row in resamples(5, 3, seed=1)] and drawn[0].shape == (
        5,
    )
    items = np.random.default_rng(0).normal(size=400)
    means = replicates_of_mean(items, number=500)
    assert means.mean() == pytest.approx(items.mean(), abs=0.01)
    assert means.std() == pytest.approx(items.std() / 20.0, rel=0.15)
    # Paired: a constant gain is clear although both figures vary far more than it.
    gap = paired_difference(items.mean(), items.mean() + 0.01, means, replicates_of_mean(items + 0.01, number=500))
    assert gap.clear and gap.value == pytest.approx(0.01) and gap.p == 1 / 500
    noise = np.random.default_rng(1).normal(size=400)
    apart = paired_difference(items.mean(), noise.mean(), means, replicates_of_mean(noise, number=500))
    assert not apart.clear and apart.low < apart.value < apart.high and apart.p > 0.05
    with pytest.raises(DataError, match="same resamples"):
        paired_difference(0.0, 1.0, means, means[:10])


def test_two_models_side_by_side(model, data):
    first = lf.probe(model, data, probes=QUICK, name="one", **SETTINGS).to_dict()
    second = lf.probe(tiny_model(seed=1), data, probes=QUICK, name="two", **SETTINGS).to_dict()
    found = compare(first, second)
    assert found.models == ("one", "two") and found.sentences == 240 and found.resamples == 12
    gap = found.differences["neighbourhoods.kept_neighbours"]
    figures = [report["sections"]["neighbourhoods"]["scores"]["kept_neighbours"]["value"] for report in (first, second)]
    assert gap.value == pytest.approx(figures[1] - figures[0]) and gap.low <= gap.high
    assert found.figures["reconstruction.bleu"][0] is not None and "reconstruction.bleu" not in found.differences
    same = compare(first, first)
    assert (
        all(gap.value == 0.0 and not gap.clear for gap in same.differences.values())
        and same.models[0] != same.models[1]
    )
    shorter = lf.probe(model, data[:200], probes=QUICK, **SETTINGS).to_dict()
    with pytest.raises(DataError, match="different sentences"):
        compare(first, shorter)
    with pytest.raises(DataError, match="different settings"):
        compare(first, lf.probe(model, data, probes=QUICK, **{**SETTINGS, "resamples": 5}).to_dict())
    part = {**second, "sections": {"overview": second["sections"]["overview"]}}
    assert compare(first, part).not_compared["reconstruction"] == "only one of the models was probed so"


def test_refusals(model, data):
    with pytest.raises(ConfigError, match="unknown probe"):
        lf.probe(model, data, probes=["colour"])
    with pytest.raises(ConfigError, match="no probe was asked for"):
        lf.probe(model, data, probes=[])
    with pytest.raises(ConfigError, match="unknown setting"):
        lf.probe(model, data, colour=1)
    with pytest.raises(ConfigError, match="paths is out of range"):
        lf.probe(model, data, paths=0)
    with pytest.raises(ConfigError, match="unknown latents"):
        lf.probe(model, data, latents="noise")
    with pytest.raises(DataError, match="STS needs sentence pairs"):
        lf.probe(model, data, probes=["sts"])
    with pytest.raises(DataError, match="empty"):
        lf.probe(model, [])
    with pytest.raises(DataError, match="no factor can be used"):
        lf.probe(model, data[:9], probes=["disentanglement"], **SETTINGS)
