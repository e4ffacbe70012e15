"""System cvae on tiny models: the fast path against the eager twin, in both forms; its parts; bad input."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.config import GenerationConfig
from lmvae_fast.data import PromptResponse
from lmvae_fast.generation.engine import generate
from lmvae_fast.generation.scoring import score
from lmvae_fast.integrations.cvae.names import fused_places, place_of
from lmvae_fast.models.latents import draw_latents
from tests.models.cvae_cases import ITEMS, OTHERS, both, noise_for

SETTINGS = [
    ("llama", {}),
    ("llama", {"padding": "released"}),
    ("llama", {"vae_type": "Vanilla", "gskip": 0}),
    ("llama", {"vae_type": "FB-VAE", "gskip": 0, "skip": 1}),
    ("llama", {"vae_type": "EMB-DG-VAE", "gskip": 2}),
    ("llama", {"vae_type": "BOW-VAE", "gskip": 0, "skip": 2}),
    ("llama", {"stage": 0}),
    ("gpt2", {}),
    ("gpt2", {"padding": "released"}),
    ("gpt2", {"vae_type": "Vanilla", "gskip": 0, "skip": 1}),
    ("gpt2", {"contrast": True}),
    ("gpt2", {"stage": 0, "contrast": True, "gskip": 0}),
]


@pytest.mark.parametrize(("family", "settings"), SETTINGS, ids=lambda value: str(value))
def test_posterior_loss_and_gradients_are_the_twins(tmp_path, family, settings):
    eager, model = both(tmp_path, family, **settings)
    padded = eager.batch(ITEMS)
    noise = noise_for(padded)
    want = eager.loss(padded, noise)
    batch = model.make_batch(model.tokenize(ITEMS))
    posterior = model.encode(batch)
    torch.testing.assert_close(posterior.mu, want.mu, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(posterior.logvar, want.logvar, rtol=1e-4, atol=1e-5)
    got = model(batch, eps=noise)
    torch.testing.assert_close(got.reconstruction, want.nll, rtol=1e-4, atol=1e-4)
    assert abs(got.loss / want.loss - 1) < 1e-5
    if eager.settings.contrast:
        assert want.loss_contrast > 0.1
        torch.testing.assert_close(got.auxiliary, want.loss_contrast.detach(), rtol=1e-4, atol=1e-4)
    want.loss.backward()
    got.loss.backward()
    compare_gradients(model, eager)


def compare_gradients(model, eager):
    parameters = dict(model.named_parameters())
    compared = set()
    for name, parameter in eager.named_parameters():
        if not parameter.requires_grad or parameter.grad is None:
            continue
        place = place_of(name)
        for where, of_file in fused_places(name) or ([] if place is None else [(place, lambda tensor: tensor)]):
            want = of_file(parameter.grad)
            got = where.of(parameters[where.name].grad).reshape(want.shape)
            assert (got - want).norm() <= 2e-4 * want.norm() + 1e-5, name
            compared.add(where.name)
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert compared == trained and len(compared) > 20


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_are_the_twins(tmp_path, family):
    eager, model = both(tmp_path, family)
    z = torch.randn(3, 8)
    prompts = ["the sun is", "plants need", "the moon moves around a"]
    config = GenerationConfig(max_new_tokens=6, min_new_tokens=2)
    got = [out.ids for out in generate(model, z, config, prompts=prompts)]
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([eager.tokenizer(prompt)["input_ids"]])
        want = eager.generate_ids(ids, z[row : row + 1], max_new_tokens=6)[0, ids.shape[1] :].tolist()
        assert got[row] == (want[: want.index(2)] if 2 in want else want)


def test_no_end_before_the_least_length(tmp_path):
    _, model = both(tmp_path, "gpt2")
    with torch.no_grad():
        model.decoder.head_weight.zero_()
        norm = model.decoder.model.transformer.ln_f
        norm.weight.zero_()
        model.decoder.head_weight[2] = norm.bias  # the end token is always the likeliest
    z = torch.randn(2, 8)
    for least, beams in ((0, 1), (2, 1), (3, 2)):
        config = GenerationConfig(max_new_tokens=5, min_new_tokens=least, num_beams=beams)
        found = list(generate(model, z, config, prompts="the sun"))
        assert [len(out.ids) for out in found] == [least, least] and all(out.finished for out in found)


def test_one_to_many_answers_of_one_prompt(tmp_path):
    _, model = both(tmp_path)
    z = torch.randn(5, 8)
    texts = model.decode(z, prompts="the sun is", max_new_tokens=5, do_sample=True, seed=1)
    assert len(texts) == 5 and len(set(texts)) > 1
    assert texts == model.decode(z, prompts=["the sun is"] * 5, max_new_tokens=5, do_sample=True, seed=1)
    assert not any(text.startswith("the sun") for text in texts)  # the response alone
    scores = score(model, z[:4], ITEMS)
    batch = model.make_batch(model.tokenize(ITEMS))
    torch.testing.assert_close(scores, -model.score(batch, z[:4]), rtol=1e-5, atol=1e-5)


# Groups ---------------------------------------------------------------------------------------------------------------


def test_no_two_prompts_share_an_aggregate(tmp_path):
    _, model = both(tmp_path)
    alone = [model.make_batch(model.tokenize(items)) for items in (ITEMS, OTHERS)]
    together = model.make_batch(model.tokenize([*ITEMS, *OTHERS]))
    mixed_order = [0, 4, 1, 2, 5, 3]
    mixed = model.make_batch(model.tokenize([[*ITEMS, *OTHERS][row] for row in mixed_order]))
    assert together.cu_groups.tolist() == [0, 4, 6] and mixed.cu_groups is None and together.max_group == 4
    noise = {name: torch.randn(6, 8, count) for name, count in (("z", 1), ("kl", 16), ("skip", 32))}
    got = model(together, eps=noise)
    first = model(alone[0], eps={name: value[:4] for name, value in noise.items()})
    second = model(alone[1], eps={name: value[4:] for name, value in noise.items()})
    torch.testing.assert_close(got.kl, torch.cat([first.kl, second.kl]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.loss, (4 * first.loss + 2 * second.loss) / 6, rtol=1e-5, atol=1e-5)
    moved = model(mixed, eps={name: value[mixed_order] for name, value in noise.items()})
    torch.testing.assert_close(moved.kl, got.kl[mixed_order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.loss, got.loss, rtol=1e-5, atol=1e-5)


def test_an_aggregate_keeps_nothing_larger_than_its_samples(tmp_path):
    """The dense form keeps [samples, N, N, D] for backward, several times."""
    _, model = both(tmp_path)
    batch = model.make_batch(model.tokenize([*ITEMS, *OTHERS]))
    posterior, sizes = model.encode(batch), []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        draw_latents(model.config, posterior, batch, beta=1.0, noise=None, seed=0).kl.sum().backward()
    assert max(sizes) <= 32 * 6 * model.decoder.hidden_size  # the residual's draws
    assert 16 * 6 * 8 in sizes and 16 * 6 * 6 * 8 not in sizes


@pytest.mark.parametrize("settings", [{"vae_type": "BOW-VAE", "gskip": 0}, {"family": "gpt2", "contrast": True}])
def test_auxiliary_terms_are_means_over_prompts(tmp_path, settings):
    settings = dict(settings)
    _, model = both(tmp_path, settings.pop("family", "llama"), **settings)
    together = model.make_batch(model.tokenize([*ITEMS, *OTHERS]))
    noise = {name: torch.randn(6, 8, n) for name, n in (("z", 1), ("kl", 16), ("skip", 32), ("bow", 40))}
    got = model(together, eps=noise).auxiliary
    parts = []
    for items, rows in ((ITEMS, slice(0, 4)), (OTHERS, slice(4, 6))):
        batch = model.make_batch(model.tokenize(items))
        parts.append(model(batch, eps={name: value[rows] for name, value in noise.items()}).auxiliary)
    torch.testing.assert_close(got, (4 * parts[0] + 2 * parts[1]) / 6, rtol=1e-4, atol=1e-5)


def test_a_prompt_with_one_response_has_the_plain_kl(tmp_path, caplog):
    _, model = both(tmp_path)
    sentences = model.tokenize(OTHERS[:1])
    assert sentences.report["single"] == 1 and "plain KL" in caplog.text
    draws = model.config.replace(kl_samples=20_000)
    model.config = draws
    with torch.no_grad():
        out = model(model.make_batch(sentences), seed=0)
    kl = model.encode(OTHERS[:1]).kl()
    torch.testing.assert_close(out.kl, kl, rtol=0.05, atol=0.05)


def test_many_responses_make_several_groups(tmp_path):
    _, model = both(tmp_path)
    model.config = model.config.replace(group_size=3)
    items = [
        PromptResponse("the sun is", f" {word}") for word in ["a", "star", "an", "object", "light", "food", "water"]
    ]
    assert model.tokenize(items).groups == [0, 1, 2, 0, 1, 2, 0]  # slice s: responses s, s + 3, ..


def test_a_seed_decides_the_noise_and_every_part_has_its_own(tmp_path):
    _, model = both(tmp_path, vae_type="EMB-DG-VAE", gskip=0, skip=1)
    batch = model.make_batch(model.tokenize(ITEMS))
    first, again, other = (model(batch, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.loss, again.loss) and not torch.equal(first.loss, other.loss)
    sigma = torch.exp(0.5 * first.logvar)
    draws = draw_latents(model.config, model.encode(batch), batch, beta=1.0, noise=None, seed=5)
    assert torch.equal(draws.z, first.z)
    for part in (draws.shift, draws.residual[:, 0]):
        assert ((part - draws.z) / sigma).abs().min() > 1e-6
