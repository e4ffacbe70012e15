"""Directions of labels against the formula, on posteriors that are given; and prompts in the latent operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.errors import DataError, LatentError
from lmvae_fast.exploration.guided import LabelClassifier, fit_label_classifier, guided, label_directions
from lmvae_fast.models.posterior import Posterior
from lmvae_fast.testing import make_model

PAIRS = [
    lf.PromptResponse(prompt, f" {word}", label)
    for prompt in ("the sun is", "plants need", "ice is")
    for word, label in (("a star", "n"), ("food", "n"), ("water", "v"), ("light", "v"), ("an object", "n"))
]


@pytest.fixture(scope="module")
def model():
    return make_model("llama", system="cvae", latent_dim=6, queries=2).eval()


@pytest.fixture
def given(model, monkeypatch):
    """Posterior means that are drawn by the response's place: dimension 2 is the label."""
    draw = np.random.default_rng(0).normal(size=(len(PAIRS), 6))
    draw[:, 2] = [1.0 if pair.label == "v" else -1.0 for pair in PAIRS]
    draw[:, 4] = 3.0  # never varies
    place = {(pair.prompt, pair.response): row for row, pair in enumerate(PAIRS)}

    def encode(items):
        mu = torch.tensor(draw[[place[item.prompt, item.response] for item in items]])
        return Posterior(mu, torch.zeros_like(mu))

    monkeypatch.setattr(model, "encode", encode)
    return draw


def test_directions_are_the_formula(model, given):
    data = lf.PromptDataset(PAIRS)
    said = np.random.default_rng(1).uniform(size=(len(PAIRS), 3))
    said[:, 1] = [0.9 if pair.label == "v" else 0.1 for pair in PAIRS]
    place = {(pair.prompt, pair.response): row for row, pair in enumerate(PAIRS)}
    classifier = LabelClassifier(
        ("a", "b", "c"), lambda items: said[[place[item.prompt, item.response] for item in items]]
    )
    found = label_directions(model, data, classifier)
    correlations = np.zeros((3, 3, 6))
    for number in range(3):
        own = slice(5 * number, 5 * number + 5)
        for label in range(3):
            for dim in (0, 1, 2, 3, 5):
                correlations[number, label, dim] = np.corrcoef(said[own, label], given[own, dim])[0, 1]
    mean = correlations.mean(0)
    moved = mean - mean.mean(0)
    for label, name in enumerate("abc"):
        expected = moved[label] / np.linalg.norm(moved[label])
        torch.testing.assert_close(found[name].double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    assert float(found["b"][2]) > 0.5  # the dimension that is the label


def test_the_classifier_of_ours_learns_the_label(model, given):
    pytest.importorskip("sklearn")
    data = lf.PromptDataset(PAIRS)
    classifier = fit_label_classifier(model, data)
    said = classifier.probabilities(PAIRS)
    assert classifier.labels == ("n", "v") and np.allclose(said.sum(1), 1.0)
    assert [classifier.labels[row.argmax()] for row in said] == [pair.label for pair in PAIRS]
    directions = label_directions(model, data, classifier)
    torch.testing.assert_close(directions["n"], -directions["v"])


def test_answers_are_decoded_from_moved_means(model):
    direction = torch.nn.functional.normalize(torch.randn(6), dim=0)
    found = guided(model, PAIRS[:3], direction, strength=2.0, max_new_tokens=4)
    z = model.encode(PAIRS[:3]).mu + 2.0 * direction
    assert found == model.decode(z, prompts=[pair.prompt for pair in PAIRS[:3]], max_new_tokens=4)


def test_a_direction_of_another_width_is_refused(model):
    with pytest.raises(LatentError, match="a direction has a number for each"):
        guided(model, PAIRS[:3], torch.ones(model.config.latent_dim + 1))


def test_what_has_no_direction_is_refused(model, given):
    alone = lf.PromptDataset([PAIRS[0], PAIRS[5]])
    same = LabelClassifier(("a", "b"), lambda items: np.full((len(items), 2), 0.5))
    with pytest.raises(DataError, match="no prompt has responses that differ"):
        label_directions(model, alone, same)
    with pytest.raises(DataError, match="no prompt has responses that differ"):
        label_directions(model, lf.PromptDataset(PAIRS), same)
    with pytest.raises(DataError, match="do not fit"):
        label_directions(model, lf.PromptDataset(PAIRS), LabelClassifier(("a", "b"), lambda items: np.zeros((1, 2))))
    with pytest.raises(DataError, match="needs labels"):
        fit_label_classifier(model, lf.PromptDataset([lf.PromptResponse("a", " b")]))


def test_operations_answer_the_prompt_of_their_responses(model):
    way = lf.interpolate(model, PAIRS[0], PAIRS[1], steps=3, max_new_tokens=4)
    assert way.texts == model.decode(way.latents, prompts="the sun is", max_new_tokens=4)
    way = lf.interpolate(model, PAIRS[0], PAIRS[6], steps=3, prompts="ice is", max_new_tokens=4)
    assert way.texts == model.decode(way.latents, prompts="ice is", max_new_tokens=4)
    with pytest.raises(DataError, match="which prompt"):
        lf.interpolate(model, PAIRS[0], PAIRS[6], steps=3)
    with pytest.raises(DataError, match="which prompt"):
        lf.neighbourhood(model, torch.zeros(6), 2, scale=1.0)
    near = lf.neighbourhood(model, PAIRS[0], 2, noise_seed=0, max_new_tokens=4)
    assert near.text == model.decode(near.center[None], prompts="the sun is", max_new_tokens=4)[0]
