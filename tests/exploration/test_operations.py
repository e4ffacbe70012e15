"""Latent operations: the latents are what they say, and each decodes to its text."""

from __future__ import annotations

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.errors import DataError, LatentError
from lmvae_fast.exploration.operations import parse_terms
from lmvae_fast.exploration.points import aggregate_quantiles
from lmvae_fast.testing import make_model

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
    assert out.values == [[-2.0, -1.0, 0.0, 1.0, 2.0]] * 2 and out.latents.shape == (2, 5, 4)
    assert out.probabilities is None and out.start == model.decode(start)[0]
    for row, dim in enumerate(out.dims):
        others = [other for other in range(4) if other != dim]
        torch.testing.assert_close(out.latents[row][:, others], start[others].expand(5, -1))
        torch.testing.assert_close(out.latents[row][:, dim], torch.tensor(out.values[row]))
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
    with pytest.raises(LatentError, match="at least 1"):
        lf.neighbourhood(model, A, samples=0)
    with pytest.raises(LatentError, match="scale=-1"):
        lf.neighbourhood(model, A, scale=-1.0)
    with pytest.raises(LatentError, match="no posterior"):
        lf.neighbourhood(model, torch.zeros(4))
    for items, weights in (([], None), (A, None), ([A, B], [1.0]), ([A, B], [1.0, -1.0]), ([A, B], [0.0, 0.0])):
        with pytest.raises(LatentError, match="each with a weight"):
            lf.average(model, items, weights)
    with pytest.raises(LatentError, match="takes no labels"):
        lf.average(model, [A], annotations=torch.zeros(2))
    with pytest.raises(LatentError, match=r"tail=0\.5"):
        lf.traverse(model, A, aggregate=torch.zeros(3, 4), tail=0.5)
    with pytest.raises(LatentError, match=r"\[3, 5\]"):
        lf.traverse(model, A, aggregate=torch.zeros(3, 5))


def test_a_neighbourhood_is_drawn_around_its_sentence(model):
    mu = model.encode([A]).mu[0]
    out = lf.neighbourhood(model, A, samples=2000, scale=0.5, noise_seed=1, max_new_tokens=1)
    assert out.latents.shape == (2000, 4)
    torch.testing.assert_close(out.center, mu)
    # a mean of 2000 draws is off by 0.5 / sqrt(2000) = 0.011, and their standard deviation by 0.008
    torch.testing.assert_close(out.latents.mean(0), mu, rtol=0, atol=0.06)
    torch.testing.assert_close(out.latents.std(0), torch.full((4,), 0.5), rtol=0, atol=0.05)
    assert out.distances == sorted(out.distances)
    torch.testing.assert_close(torch.tensor(out.distances), (out.latents - mu).norm(dim=1))
    again = lf.neighbourhood(model, mu, samples=2000, scale=0.5, noise_seed=1, max_new_tokens=1)
    assert again.texts == out.texts


def test_a_neighbourhood_of_the_posterior(model):
    posterior = model.encode([A])
    out = lf.neighbourhood(model, A, samples=2000, noise_seed=1, max_new_tokens=1)
    sigma = torch.exp(0.5 * posterior.logvar[0])
    torch.testing.assert_close(out.latents.std(0) / sigma, torch.ones(4), rtol=0, atol=0.1)
    few = lf.neighbourhood(model, A, samples=3, noise_seed=1)
    assert few.text == model.decode(posterior.mu)[0]
    assert few.texts == model.decode(few.latents)


def test_an_average_is_the_mean_of_its_items(model):
    mu = model.encode([A, B]).mu
    z = torch.tensor([1.0, 2.0, 3.0, 4.0])
    out = lf.average(model, [A, z, B], [1.0, 2.0, 1.0])
    torch.testing.assert_close(out.latent, (mu[0] + 2 * z + mu[1]) / 4)
    torch.testing.assert_close(out.latents, torch.stack([mu[0], z, mu[1]]))
    assert out.text == model.decode(out.latent)[0] and out.texts == model.decode(out.latents)
    torch.testing.assert_close(torch.tensor(out.distances), (out.latents - out.latent).norm(dim=1))
    torch.testing.assert_close(lf.average(model, [A, B]).latent, mu.mean(0))


def test_quantiles_of_the_aggregate_posterior():
    # one posterior: the normal distribution's own
    one = lf.Posterior(torch.tensor([[1.0, -2.0]]), torch.log(torch.tensor([[4.0, 0.25]])))
    got = aggregate_quantiles(one, [0.025, 0.5, 0.975])
    want = torch.tensor([[1.0], [-2.0]]) + torch.tensor([[2.0], [0.5]]) * torch.tensor([[-1.959964, 0.0, 1.959964]])
    torch.testing.assert_close(got.float(), want, rtol=1e-6, atol=1e-6)
    # two far apart: a quarter of the mixture is half of its left component
    two = lf.Posterior(torch.tensor([[-50.0], [50.0]]), torch.zeros(2, 1))
    torch.testing.assert_close(
        aggregate_quantiles(two, [0.25, 0.75]), torch.tensor([[-50.0, 50.0]]).double(), rtol=1e-9, atol=1e-9
    )
    # many: as many draws of mu + sigma * noise say
    torch.manual_seed(0)
    many = lf.Posterior(torch.randn(50, 3), torch.randn(50, 3))
    draws = many.sample(4000, seed=3).flatten(0, 1)
    probabilities = [0.05, 0.3, 0.5, 0.9]
    torch.testing.assert_close(
        aggregate_quantiles(many, probabilities, [2, 0]), aggregate_quantiles(draws, probabilities, [2, 0]),
        rtol=0, atol=0.03,
    )  # fmt: skip
    with pytest.raises(LatentError, match=r"within \(0, 1\)"):
        aggregate_quantiles(many, [0.0])
    with pytest.raises(LatentError, match="finite"):
        aggregate_quantiles(torch.zeros(0, 3), [0.5])


def test_a_traversal_of_quantiles(model):
    posterior = model.encode([A, B])
    out = lf.traverse(model, A, dims=[3, 1], steps=5, aggregate=posterior, tail=0.1)
    assert out.probabilities == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    torch.testing.assert_close(
        torch.tensor(out.values).double(), aggregate_quantiles(posterior, out.probabilities, [3, 1])
    )
    torch.testing.assert_close(out.latents[0, :, 3], torch.tensor(out.values[0]))
    from_latents = lf.traverse(model, A, dims=[1], steps=3, aggregate=torch.arange(44.0).view(11, 4), tail=0.1)
    assert from_latents.values[0] == pytest.approx([5.0, 21.0, 37.0])


def test_quantiles_in_chunks_are_the_same(monkeypatch):
    torch.manual_seed(0)
    posterior = lf.Posterior(torch.randn(7, 5), torch.randn(7, 5))
    whole = aggregate_quantiles(posterior, [0.2, 0.8])
    monkeypatch.setattr("lmvae_fast.exploration.points._CHUNK", 28)
    torch.testing.assert_close(aggregate_quantiles(posterior, [0.2, 0.8]), whole, rtol=0, atol=0)


LABELS = ("V", "ARG0")
A_LABELLED, B_LABELLED = lf.Example("a cat runs", ("ARG0", "ARG0", "V")), lf.Example("water boils", ("ARG0", "V"))


@pytest.fixture(scope="module")
def conditional():
    return make_model("gpt2", latent_dim=4, max_len=12, annotations=LABELS, conditional_decoder=True).eval()


def test_labels_go_along(conditional, monkeypatch):
    model, seen = conditional, []
    labels = model.tokenize([A_LABELLED, B_LABELLED]).annotations
    monkeypatch.setattr(
        type(model),
        "decode",
        lambda self, z, *, annotations=None, **_: seen.append(annotations) or ["x"] * len(z.view(-1, 4)),
    )
    lf.interpolate(model, A_LABELLED, B_LABELLED, steps=3)
    torch.testing.assert_close(seen[-1], torch.stack([labels[0], labels.mean(0), labels[1]]))
    lf.traverse(model, A_LABELLED, dims=[0], steps=2)
    torch.testing.assert_close(seen[-1], labels[:1].expand(3, -1))
    lf.neighbourhood(model, B_LABELLED, samples=2)
    torch.testing.assert_close(seen[-1], labels[1:].expand(3, -1))
    lf.average(model, [A_LABELLED, B_LABELLED])
    torch.testing.assert_close(seen[-1], torch.stack([labels.mean(0), labels[0], labels[1]]))
    lf.arithmetic(model, "a - b", sentences={"a": B_LABELLED, "b": A_LABELLED})
    torch.testing.assert_close(seen[-1], labels[1:])
    given = torch.tensor([0.5, 0.25])
    lf.interpolate(model, torch.zeros(4), torch.ones(4), steps=2, annotations=given)
    torch.testing.assert_close(seen[-1], given.expand(2, -1))


def test_conditional_decoders_decode(conditional):
    assert len(lf.interpolate(conditional, A_LABELLED, B_LABELLED, steps=3).texts) == 3
    with pytest.raises(DataError, match="has no labels"):
        lf.interpolate(conditional, A, B)
    with pytest.raises(LatentError, match="needs the pooled labels"):
        lf.neighbourhood(conditional, torch.zeros(4), scale=1.0)
    with pytest.raises(LatentError, match=r"finite \[2\]"):
        lf.neighbourhood(conditional, torch.zeros(4), scale=1.0, annotations=torch.zeros(3))


def test_every_operation_is_one_batch(model, monkeypatch):
    calls, decode = [], type(model).decode
    monkeypatch.setattr(type(model), "decode", lambda self, z, **other: calls.append(z) or decode(self, z, **other))
    lf.interpolate(model, A, B, steps=4)
    lf.traverse(model, A, dims=[0, 1], steps=3)
    lf.arithmetic(model, "a - b", sentences={"a": A, "b": B})
    lf.neighbourhood(model, A, samples=5)
    lf.average(model, [A, B])
    assert [z.view(-1, 4).shape[0] for z in calls] == [4, 7, 1, 6, 3]
