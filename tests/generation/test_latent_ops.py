"""Interpolation, traversal, arithmetic: the latents are what they say, and each decodes to its text."""

from __future__ import annotations

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.errors import DataError, LatentError
from lmvae_fast.generation.latent_ops import parse_terms
from tests.models.tiny import make_model

A, B = "a cat is a kind of animal", "water boils"


@pytest.fixture(scope="module")
def model():
    return make_model("gpt2", latent_dim=4, max_len=12).eval()


def test_interpolation_hits_both_ends(model):
    mu = model.encode([A, B]).mu
    way = lf.interpolate(model, A, B, steps=5)
    torch.testing.assert_close(way.latents[0], mu[0])
    torch.testing.assert_close(way.latents[-1], mu[1])
    torch.testing.assert_close(way.latents[2], (mu[0] + mu[1]) / 2)
    assert way.weights == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert way.texts == model.decode(way.latents)
    from_latents = lf.interpolate(model, mu[0], mu[1], steps=5)
    assert from_latents.texts == way.texts


def test_spherical_interpolation_keeps_the_length(model):
    a, b = torch.tensor([2.0, 0, 0, 0]), torch.tensor([0, 2.0, 0, 0])
    way = lf.interpolate(model, a, b, steps=7, spherical=True)
    torch.testing.assert_close(way.latents.norm(dim=1), torch.full((7,), 2.0))
    torch.testing.assert_close(way.latents[3], torch.tensor([2.0**0.5, 2.0**0.5, 0, 0]))
    opposite = lf.interpolate(model, a, -a, steps=3, spherical=True)
    assert torch.isfinite(opposite.latents).all()


def test_traversal_moves_one_dimension(model):
    start = model.encode([A]).mu[0]
    out = lf.traverse(model, A, dims=[2, 0], steps=5, span=2.0)
    assert out.values == [-2.0, -1.0, 0.0, 1.0, 2.0] and out.latents.shape == (2, 5, 4)
    for row, dim in enumerate(out.dims):
        others = [other for other in range(4) if other != dim]
        torch.testing.assert_close(out.latents[row][:, others], start[others].expand(5, -1))
        torch.testing.assert_close(out.latents[row][:, dim], torch.tensor(out.values))
        assert out.texts[row] == model.decode(out.latents[row])
    assert len(lf.traverse(model, A, steps=2).texts) == 4


def test_arithmetic_adds_means(model):
    mu = model.encode([A, B]).mu
    out = lf.arithmetic(model, "a cat is a kind of animal - 0.5 * x + x", sentences={"x": B})
    torch.testing.assert_close(out.latent, mu[0] + 0.5 * mu[1])
    assert out.text == model.decode(out.latent)[0]


@pytest.mark.parametrize(
    ("expression", "terms"),
    [
        ("a - b + c", [(1.0, "a"), (-1.0, "b"), (1.0, "c")]),
        ("a well-known cat + 2 * dogs", [(1.0, "a well-known cat"), (2.0, "dogs")]),
        ("'a - b' - \"c + d\"", [(1.0, "a - b"), (-1.0, "c + d")]),
        ("- a + b", [(-1.0, "a"), (1.0, "b")]),
        ("-1.5 * a", [(-1.5, "a")]),
    ],
)
def test_expressions(expression, terms):
    assert parse_terms(expression) == terms


@pytest.mark.parametrize("expression", ["", "  ", "a + ", "+ + a"])
def test_no_sum_of_sentences(expression):
    with pytest.raises(DataError, match="no sum"):
        parse_terms(expression)


def test_bad_requests(model):
    with pytest.raises(LatentError, match="at least 2"):
        lf.interpolate(model, A, B, steps=1)
    with pytest.raises(LatentError, match="0 to 3"):
        lf.traverse(model, A, dims=[4])
    with pytest.raises(LatentError, match="floating"):
        lf.interpolate(model, torch.zeros(3), B)
