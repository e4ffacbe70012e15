"""The page of a report: every section with its table, its pictures and a sentence on each figure."""

from __future__ import annotations

import numpy as np
import pytest

import lmvae_fast as lf
from lmvae_fast.data import generate_corpus
from lmvae_fast.probes import of_latents
from lmvae_fast.probes.meanings import HEADINGS, MEANINGS, meaning
from lmvae_fast.probes.run import PROBES
from lmvae_fast.reports import probes as pages
from tests.probes.tiny import SETTINGS, tiny_model


@pytest.fixture(scope="module")
def report():
    return lf.probe(tiny_model(), generate_corpus(240), name="a <tiny> model", **SETTINGS)


def test_every_figure_has_a_meaning_and_a_range(report):
    assert set(HEADINGS) == set(PROBES) == set(MEANINGS)
    for probe, section in report.sections.items():
        for figure in section.scores:
            about = meaning(probe, figure)
            assert about.text and about.range, (probe, figure)


def test_page(report, tmp_path):
    page = pages.write(report.to_dict(), tmp_path / "page.html").read_text()
    for probe in report.sections:
        assert f"<h2>{HEADINGS[probe][0]}</h2>" in page
    assert "a &lt;tiny&gt; model" in page and "<tiny>" not in page
    # dimensions, information, importance, maps, smoothness: one picture each
    assert page.count("<figure") == 5 and page.count("aria-label") == 5
    assert "Not run" in page and "--sts" in page and "Left out:" in page
    assert "NaN" not in page and "None" not in page.replace("sts None", "")


def test_pages_stand_figures_that_are_absent(report, tmp_path):
    found = report.to_dict()
    found["sections"]["disentanglement"]["pictures"].pop("importance")
    found["sections"]["disentanglement"]["scores"]["mig"]["value"] = None
    found["sections"]["maps"]["pictures"] = {"points": {}, "colours": {}}
    assert pages.write(found, tmp_path / "page.html").read_text().count("<figure") == 3


def test_wide_latents_show_their_most_telling_dimensions():
    pictures = {"factors": ["a", "b"], "mutual_information": np.random.default_rng(0).random((300, 2))}
    figure, _ = pages._matrix(pictures, "mutual_information", "title")
    labels = [int(label.get_text()) for label in figure.axes[0].get_xticklabels()]
    best = np.argsort(-pictures["mutual_information"].max(axis=1))[:96]
    assert sorted(labels) == sorted(best.tolist())


def test_colours_are_the_factors_that_show_most():
    table = lf.probes.factors.table({
        "two": [n % 2 for n in range(60)], "six": [n % 6 for n in range(60)], "many": [n % 30 for n in range(60)],
    })  # fmt: skip
    assert of_latents._clearest(table) == ["six", "two", "many"]
