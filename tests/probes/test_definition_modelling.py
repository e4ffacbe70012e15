"""Sense-BLEU, lemma-BLEU and the reverse dictionary against CODWOE's own scorer."""

from __future__ import annotations

import numpy as np
import pytest

from lmvae_fast.data import read_definitions
from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.probes.definition_modelling import lemma_bleu, reverse_dictionary, sense_bleu

pytest.importorskip("nltk", reason="nltk is not installed")

EXACT = 1e-9


@pytest.mark.parametrize("direction", ["standard", "codwoe"])
def test_bleu_of_recorded_items(record, direction):
    recorded = record("defmod/codwoe_metrics.json")
    rows = recorded["records"]
    ours, theirs = [row["prediction"] for row in rows], [row["reference"] for row in rows]
    lemmas = [(row["word"], row["pos"]) for row in rows]
    suffix = "codwoe" if direction == "codwoe" else "reference_as_reference"
    sense, lemma = sense_bleu(ours, theirs, direction), lemma_bleu(ours, theirs, lemmas, direction)
    np.testing.assert_allclose(
        sense.details["items"], [row[f"sense_bleu_{suffix}"] for row in rows], rtol=0, atol=EXACT
    )
    name = "lemma_bleu_codwoe" if direction == "codwoe" else "lemma_bleu_max_reference_as_reference"
    np.testing.assert_allclose(lemma.details["items"], [row[name] for row in rows], rtol=0, atol=EXACT)
    assert sense.value == pytest.approx(recorded["mean"][f"sense_bleu_{suffix}"], abs=EXACT)
    assert lemma.value == pytest.approx(recorded["mean"][name], abs=EXACT)
    assert sense.choices["reference"] == ("prediction" if direction == "codwoe" else "gloss")
    joined = sense_bleu([" ".join(row) for row in ours], [" ".join(row) for row in theirs], direction)
    assert joined == sense


def test_sense_bleu_of_every_sentence_pair(record):
    metrics = record("text/text_metrics.json")
    found = sense_bleu(metrics["hypotheses"], metrics["references"], "codwoe")
    want = metrics["codwoe_sense_bleu_method4_reference_is_prediction"]
    np.testing.assert_allclose(found.details["items"], want, rtol=0, atol=EXACT)
    standard = sense_bleu(metrics["hypotheses"], metrics["references"])
    np.testing.assert_allclose(standard.details["items"], metrics["nltk"]["sentence_bleu4_method4"], rtol=0, atol=EXACT)


def test_reverse_dictionary(record):
    want = record("defmod/codwoe_metrics.json")["revdict"]
    found = reverse_dictionary(want["prediction"], want["target"])
    # Recorded in float32.
    for ours, theirs in (("mse", "mse"), ("cosine", "cosine"), ("rank", "rank_cosine")):
        assert found[ours].value == pytest.approx(want[theirs], rel=1e-6)
    perfect = reverse_dictionary(want["target"], want["target"])
    assert perfect["rank"].value == pytest.approx(1 / 15) and perfect["mse"].value == 0.0


def test_definitions_of_a_file(shared):
    """A dataset of definitions brings what lemma-BLEU groups by."""
    data = read_definitions(shared / "data" / "oewn_definitions.tsv", limit=400)
    data = data.select(
        row for row, gloss in enumerate(data.glosses) if len(gloss.split()) >= 4
    )  # BLEU-4 of itself is 1
    assert len(set(data.words)) < len(data)
    lemmas = list(zip(data.words, data.pos, strict=True))
    assert lemma_bleu(data.glosses, data.glosses, lemmas).value == pytest.approx(1.0)
    turned = [data.glosses_by_word()[lemma][-1] for lemma in lemmas]
    assert lemma_bleu(turned, data.glosses, lemmas).value == pytest.approx(1.0)
    assert sense_bleu(turned, data.glosses).value < 0.99


def test_refusals():
    with pytest.raises(ConfigError, match="unknown direction"):
        sense_bleu(["a"], ["a"], "backwards")
    with pytest.raises(DataError, match="equally many"):
        lemma_bleu(["a", "b"], ["a", "b"], ["x"])
    with pytest.raises(DataError, match="list of texts"):
        sense_bleu("a b", ["a b"])
    with pytest.raises(DataError, match="one shape"):
        reverse_dictionary(np.eye(2), np.eye(3))
    assert sense_bleu([""], ["a gloss"]).value == 0.0
