"""The fast CVAE against what the public code itself recorded (shared/golden/cvae_llama), in all variants."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lmvae_fast.config import GenerationConfig
from lmvae_fast.data import PromptResponse
from lmvae_fast.errors import CheckpointError, ConfigError
from lmvae_fast.generation.engine import generate
from lmvae_fast.integrations.cvae import load_checkpoint
from lmvae_fast.integrations.cvae.names import place_of
from lmvae_fast.models.latents import draw_latents
from lmvae_fast.models.posterior import Posterior
from lmvae_fast.models.systems.cvae import objective_of
from lmvae_fast.reference.cvae import load_checkpoint as reference_checkpoint

VARIANTS = {
    "main": ({}, None),
    "plain": ({"kl_mode": "sum", "output_residual": "none"}, None),
    "skip": ({"output_residual": "skip"}, None),
    "emb": ({"kl_mode": "sum", "output_residual": "none", "embedding_shift": True}, "cvae_emb"),
    "bow": ({"kl_mode": "sum", "output_residual": "none", "bag_of_words": True}, "cvae_bow"),
}
PENALTIES = ("Vanilla", "AE", "Beta-VAE", "Beta02-VAE", "Beta05-VAE", "FB-VAE", "DG-VAE", "Anneal_", "Optimus_")


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "golden" / "cvae_llama"


@pytest.fixture(scope="module")
def record(folder):
    return load_file(folder / "record.safetensors")


@pytest.fixture(scope="module")
def facts(folder):
    return json.loads((folder / "record.json").read_text())


@pytest.fixture(scope="module")
def load(folder):
    kept = {}

    def loaded(variant="main", *, padding="released", **changes):
        key = (variant, padding, *sorted(changes.items()))
        if key not in kept:
            settings, extra = VARIANTS[variant]
            kept[key] = load_checkpoint(
                folder / "cvae_main", base_model=folder / "base_model", padding=padding,
                extra=None if extra is None else folder / extra, **{**settings, **changes},
            )  # fmt: skip
        return kept[key]

    return loaded


def items_of(facts):
    return [PromptResponse(facts["prompt"], response) for response in facts["responses"]]


def noise_of(record):
    return {
        name.removeprefix("eps.").replace("decode_z", "z"): x for name, x in record.items() if name.startswith("eps.")
    }


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def test_texts_become_the_recorded_ids(load, record, facts):
    model = load()
    batch = model.make_batch(model.tokenize(items_of(facts)))
    real = record["attention_mask"][:, 1:] == 1  # the decoder reads all but a row's last token
    assert torch.equal(batch.input_ids, record["input_ids"][:, :-1][real])
    assert torch.equal(batch.labels, record["labels"][:, 1:][real])
    assert torch.equal(batch.encoder_ids, record["posterior_input_ids"].flatten())
    assert torch.equal(batch.encoder_mask, record["posterior_attention_mask"].flatten())


def test_limits_cut_as_recorded(folder, record, facts):
    model = load_checkpoint(
        folder / "cvae_main", base_model=folder / "base_model", padding="released", max_prompt_len=20, max_len=8
    )
    sentences = model.tokenize(items_of(facts))
    batch = model.make_batch(sentences)
    real = record["cut.attention_mask"][:, 1:] == 1
    assert torch.equal(batch.input_ids, record["cut.input_ids"][:, :-1][real])
    assert torch.equal(batch.labels, record["cut.labels"][:, 1:][real])
    assert torch.equal(batch.encoder_ids, record["cut.posterior_input_ids"].flatten())
    assert sentences.report["prompts_cut"] == 6 and sentences.report["truncated"] == 3


def test_posterior_and_memory(load, record, facts):
    model = load()
    posterior = model.encode(items_of(facts))
    assert relative(posterior.mu, record["mean"]) < 1e-5
    assert relative(posterior.logvar, record["logvar"]) < 1e-5
    for z, prefix in ((record["z"], "memory"), (torch.zeros(1, 32), "memory_at_zero")):
        memory = model.inject(z).memory
        for layer, (keys, values) in enumerate(memory):
            assert relative(keys, record[f"{prefix}.{layer}.key"]) < 1e-5
            assert relative(values, record[f"{prefix}.{layer}.value"]) < 1e-5


def test_by_default_padding_is_masked(load, record, facts):
    posterior = load(padding="masked").encode(items_of(facts))
    assert relative(posterior.mu, record["mean_unpadded"]) < 1e-5
    assert relative(posterior.logvar, record["logvar_unpadded"]) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_every_recorded_gradient(load, record, facts, variant):
    model = load(variant)
    model.zero_grad()
    out = model(model.make_batch(model.tokenize(items_of(facts))), eps=noise_of(record))
    kl = out.kl.mean() + (0 if out.auxiliary is None else out.auxiliary)
    for name, got in (("loss", out.loss), ("loss_kld", kl), ("nll", out.reconstruction)):
        assert relative(got, record[f"{variant}.{name}"].view_as(got)) < 1e-5, name
    out.loss.backward()
    compare_gradients(model, record, f"{variant}.grad.")


def compare_gradients(model, record, prefix, without=()):
    compared = set()
    parameters = dict(model.named_parameters())
    for name in (name for name in record if name.startswith(prefix)):
        place = place_of(name[len(prefix) :])
        got = place.of(parameters[place.name].grad)
        assert relative(got.reshape(record[name].shape), record[name]) < 1e-4, name
        compared.add(place.name)
    assert compared == {name for name, parameter in parameters.items() if parameter.requires_grad}


def test_every_gradient_of_stage_0(load, folder, record, facts):
    model = load(stage=0)
    model(model.make_batch(model.tokenize(items_of(facts))), eps=noise_of(record)).loss.backward()
    compare_gradients(model, load_file(folder / "record_stage0.safetensors"), "grad.")


def test_gskip_changes_no_value(load, record, facts):
    model = load()
    batch = model.make_batch(model.tokenize(items_of(facts)))
    draws = draw_latents(model.config, model.encode(batch), batch, beta=1.0, noise=noise_of(record), seed=None)
    residual = model.inject(draws.z, residual_z=draws.residual).output_residual
    assert residual.requires_grad and torch.equal(residual, record["main.skip_residue"][:, 0])
    assert model.inject(draws.z).output_residual is None  # nothing of it is left in generation
    skip = load("skip")
    residual = skip.inject(draws.z, residual_z=draws.residual).output_residual
    assert relative(residual, record["skip.skip_residue"][:, 0]) < 1e-5


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_and_their_gradients(load, record, facts, name):
    fields, training = objective_of(name)
    base = load()
    batch = base.make_batch(base.tokenize(items_of(facts)))
    config = base.config.replace(**fields, output_residual="none")
    mu, logvar = (record[key].clone().requires_grad_() for key in ("mean", "logvar"))
    weight = {"Anneal_": 0.8, "Optimus_": 0.8}.get(name, training["beta"])  # the recorded calls' w
    latents = draw_latents(config, Posterior(mu, logvar), batch, beta=weight, noise=noise_of(record), seed=None)
    got, want = weight * latents.kl.mean(), record[f"kl.{name}"][0]
    if name == "AE":
        assert got == want == 0
        return
    assert abs(got / want - 1) < 1e-5
    got.backward()
    assert relative(mu.grad, record[f"kl.{name}.grad_mean"]) < 1e-5
    assert relative(logvar.grad, record[f"kl.{name}.grad_logvar"]) < 1e-5


@pytest.mark.parametrize("variant", ["main", "skip", "emb"])
@pytest.mark.parametrize("latent", ["sampled", "mean", "zero"])
def test_greedy_ids(load, record, facts, variant, latent):
    model = load(variant)
    mu, sigma = record["mean"], torch.exp(0.5 * record["logvar"])
    z, shift, residual = mu, mu, (mu[..., None] + sigma[..., None] * record["eps.skip"]).transpose(1, 2)
    if latent == "zero":
        z, shift, residual = torch.zeros(1, 32), torch.zeros(1, 32), record["eps.skip"][:1].transpose(1, 2)
    if latent == "sampled":
        z, shift = record["z"], mu + sigma * record["eps.emb"][..., 0]
    beside = {"main": {}, "skip": {"residual_z": residual}, "emb": {"shift_z": shift}}[variant]
    config = GenerationConfig(max_new_tokens=14, min_new_tokens=2, batch_size=4)
    got = [out.ids for out in generate(model, z, config, prompts=facts["prompt"], beside=beside)]
    want = record[f"{variant}.generated.{latent}"][:, record["prompt_ids"].shape[1] :]
    assert got == [until_end(row) for row in want.tolist()]


def until_end(ids, end=1):
    return ids[: ids.index(end)] if end in ids else ids


def test_prompts_of_different_length_need_no_padding(load, record, facts):
    prompts = [facts["prompt"], facts["second_prompt"]]
    config = GenerationConfig(max_new_tokens=14, min_new_tokens=2)
    got = [out.ids for out in generate(load(), record["left_padded.z"], config, prompts=prompts)]
    assert got == [until_end(row[-14:]) for row in record["main.generated.left_padded"].tolist()]


def test_a_response_is_cut_where_a_turn_ends(load, record, facts):
    texts = load().decode(record["mean"], prompts=facts["prompt"], max_new_tokens=14)
    whole = [text[len("<|begin_of_text|>" + facts["prompt"]) :] for text in facts["generated"]["main.generated.mean"]]
    assert "<|eot_id|>" in whole[2]
    for got, want in zip(texts, whole, strict=True):
        assert "".join(got.split()) == "".join(want.split("<|eot_id|>")[0].split())


def test_what_a_folder_or_an_override_cannot_mean_is_named(folder, load, tmp_path):
    with pytest.raises(ConfigError, match="foo"):
        load(dtype="foo")
    with pytest.raises(ConfigError, match="unknown field"):
        load(foo=1)
    options = {"base_model": folder / "base_model"}
    with pytest.raises(ConfigError, match="unknown settings; got: foo"):
        reference_checkpoint(folder / "cvae_main", **options, foo=3)
    with pytest.raises(CheckpointError, match="decoder"):
        reference_checkpoint(folder / "cvae_main", base_model=tmp_path / "nothing")
    (tmp_path / "model.safetensors").symlink_to(folder / "cvae_main" / "model.safetensors")
    said = json.loads((folder / "cvae_main" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**said, "add_gskip_connection": "x"}))
    with pytest.raises(CheckpointError, match="add_gskip_connection is no whole number; got: 'x'"):
        load_checkpoint(tmp_path, **options)
