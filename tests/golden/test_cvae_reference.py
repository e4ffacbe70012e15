"""The eager CVAE against what the public code itself recorded (shared/golden/cvae_llama)."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from lmvae_fast.reference import cvae
from lmvae_fast.reference.cvae_objective import RAMPS, anneal_weight, mutual_information, penalty
from lmvae_fast.reference.cvae_parts import first_queries
from lmvae_fast.reference.cvae_text import CVAEBatch, collate

# Variant of the record -> what differs from the folder's configuration, and the folder with its own parameters.
VARIANTS = {
    "main": ({}, None),
    "plain": ({"vae_type": "Vanilla", "gskip": 0}, None),
    "skip": ({"gskip": 0, "skip": 1}, None),
    "emb": ({"vae_type": "EMB-VAE", "gskip": 0}, "cvae_emb"),
    "bow": ({"vae_type": "BOW-VAE", "gskip": 0}, "cvae_bow"),
}
PENALTIES = ("Vanilla", "AE", "Beta-VAE", "Beta02-VAE", "Beta05-VAE", "FB-VAE", "DG-VAE", "Anneal_", "Optimus_")


class Item(NamedTuple):
    prompt: str
    response: str


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
    """A variant's model, loaded once for each variant, stage and padding."""
    kept = {}

    def loaded(variant="main", *, padding="released", **changes):
        key = (variant, padding, *sorted(changes.items()))
        if key not in kept:
            settings, extra = VARIANTS[variant]
            kept[key] = cvae.load_checkpoint(
                folder / "cvae_main", base_model=folder / "base_model", padding=padding,
                extra=None if extra is None else folder / extra, **{**settings, **changes},
            )  # fmt: skip
        return kept[key]

    return loaded


def batch_of(record, prefix=""):
    names = ("posterior_input_ids", "posterior_attention_mask", "input_ids", "attention_mask", "labels")
    return CVAEBatch(*(record[prefix + name] for name in names))


def noise_of(record):
    return {name: value for name, value in record.items() if name.startswith("eps.")}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def items_of(facts):
    return [Item(facts["prompt"], response) for response in facts["responses"]]


@pytest.mark.parametrize(("prefix", "limits"), [("", (256, 36)), ("cut.", (20, 8))])
def test_texts_become_the_recorded_ids(load, record, facts, prefix, limits):
    tokenizer = load().tokenizer
    got = collate(items_of(facts), tokenizer, max_prompt=limits[0], max_response=limits[1])
    for name, tensor, want in zip(CVAEBatch._fields, got, batch_of(record, prefix), strict=True):
        assert torch.equal(tensor, want), name


def test_the_longest_response_ends_where_it_fills_the_limit(load, record, facts):
    other = [Item(facts["prompt"], response) for response in facts["other_slices"][0]]
    got = collate(other, load().tokenizer, max_prompt=256, max_response=36)
    assert torch.equal(got.input_ids, record["slice1.raw_input_ids"])


def test_posterior_and_memory(load, record, facts):
    model = load()
    mu, logvar = model.encode(items_of(facts))
    assert relative(mu, record["mean"]) < 1e-5
    assert relative(logvar, record["logvar"]) < 1e-5
    for memory, prefix in ((model.memory(record["z"]), "memory"), (model.memory(torch.zeros(1, 32)), "memory_at_zero")):
        for layer, (keys, values) in enumerate(memory):
            assert relative(keys, record[f"{prefix}.{layer}.key"]) < 1e-5
            assert relative(values, record[f"{prefix}.{layer}.value"]) < 1e-5


def test_masked_padding_gives_the_posterior_without_padding(load, record, facts):
    mu, logvar = load(padding="masked").encode(items_of(facts))
    assert relative(mu, record["mean_unpadded"]) < 1e-5
    assert relative(logvar, record["logvar_unpadded"]) < 1e-5
    assert relative(record["mean"], record["mean_unpadded"]) > 0.1  # the two are far apart


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_every_recorded_gradient(load, record, variant):
    model = load(variant)
    model.zero_grad()
    batch = batch_of(record)
    out = model.loss(batch, noise_of(record))
    for name, got in (
        ("loss", out.loss), ("loss_lm", out.loss_lm), ("loss_kld", out.loss_kl), ("mi", out.mutual_information),
        ("nll", out.nll),
    ):  # fmt: skip
        assert relative(got, record[f"{variant}.{name}"].view_as(got)) < 1e-5, name
    assert relative(out.z, record["z"]) < 1e-5
    real = batch.attention_mask == 1
    assert relative(out.logits[real], record[f"{variant}.logits"][real]) < 1e-5
    if f"{variant}.skip_residue" in record:
        want = record[f"{variant}.skip_residue"][:, 0]
        assert torch.equal(out.residual, want) if variant == "main" else relative(out.residual, want) < 1e-5
    if f"{variant}.embedding" in record:
        assert relative(out.embedding, record[f"{variant}.embedding"][:, 0]) < 1e-5
    out.loss.backward()
    compare_gradients(model, record, f"{variant}.grad.")


def compare_gradients(model, record, prefix, without=()):
    names = {name[len(prefix) :] for name in record if name.startswith(prefix)}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == names | set(without)
    for name in names:
        assert relative(model.get_parameter(name).grad, record[prefix + name]) < 1e-4, name
    assert all(model.get_parameter(name).grad is None for name in without)


def test_every_gradient_of_stage_0(load, folder, record, facts):
    model = load(stage=0)
    model.loss(batch_of(record), noise_of(record)).loss.backward()
    want = load_file(folder / "record_stage0.safetensors")
    compare_gradients(model, want, "grad.", facts["variants"]["stage0_without_gradient"])


def test_what_trains_in_each_stage(load):
    trained = {
        stage: {name for name, parameter in load(stage=stage).named_parameters() if parameter.requires_grad}
        for stage in (0, 1, 2)
    }
    everything = {name for name, _ in load(stage=1).named_parameters()}
    decoder = {name for name in everything if name.startswith(("latent_decoder.model.", "latent_decoder.lm_head."))}
    copies = {name for name in everything if ".latent_adapters." in name and ".self_attn." in name}
    assert trained[0] == everything
    assert trained[1] == everything - decoder
    assert trained[2] == trained[1] - copies - {"latent_encoder.embed_tokens.weight"}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_and_their_gradients(record, facts, name):
    mu, logvar = (record[key].clone().requires_grad_() for key in ("mean", "logvar"))
    weight = 1.0
    if name in RAMPS:
        rise, full = RAMPS[name]
        setting = facts["variants"]["anneal"][name]
        weight = anneal_weight(
            setting["counter_after_call"], rise=rise, full=full, train=setting["train_steps"],
            evaluation=setting["eval_steps"],
        )  # fmt: skip
        assert 0 < weight < 1
    got = penalty(name, mu, logvar, record["eps.kl"], weight=weight)
    want = record[f"kl.{name}"][0]
    if name == "AE":
        assert got == want == 0
        return
    assert abs(got / want - 1) < 1e-5
    got.backward()
    assert relative(mu.grad, record[f"kl.{name}.grad_mean"]) < 1e-5
    assert relative(logvar.grad, record[f"kl.{name}.grad_logvar"]) < 1e-5


def test_annealing_counts_as_recorded(record):
    got = [anneal_weight(call, rise=0.5, full=0.75, train=20, evaluation=10) for call in range(1, 61)]
    torch.testing.assert_close(torch.tensor(got), record["anneal_schedule"])
    assert {0.0, 1.0} < set(got)


def test_an_annealed_model_counts_its_calls(load, record):
    model = load("plain", vae_type="Anneal2")
    model.anneal_train, model.calls = 8, 4
    plain, got = load("plain").loss(batch_of(record), noise_of(record)), []
    for _ in range(4):
        got.append(model.loss(batch_of(record), noise_of(record)).loss_kl / plain.loss_kl)
    torch.testing.assert_close(torch.stack(got), torch.tensor([0.5, 1.0, 1.0, 1.0]))


def test_figures_of_the_evaluation(record):
    mu, logvar, noise = record["mean"], record["logvar"], record["eps.mi"]
    assert abs(mutual_information(mu, logvar, noise) / record["latent.joint_mi"] - 1) < 1e-5
    assert abs(mutual_information(mu, logvar, noise, joint=False) / record["latent.marginal_mi"] - 1) < 1e-5


def test_the_encoder_begins_as_recorded(load, record):
    table = load().latent_decoder.model.embed_tokens.weight
    torch.testing.assert_close(first_queries(table, 4), record["init.latent_queries"])


@pytest.mark.parametrize("variant", ["main", "skip", "emb"])
@pytest.mark.parametrize("latent", ["sampled", "mean", "zero"])
def test_greedy_ids(load, record, variant, latent):
    model = load(variant)
    mu, sigma = record["mean"], torch.exp(0.5 * record["logvar"])
    # Skip draws its samples also where z itself is the mean, or 0.
    z, z_emb, z_skip = mu, mu, (mu[..., None] + sigma[..., None] * record["eps.skip"]).transpose(1, 2)
    if latent == "zero":
        z, z_emb, z_skip = torch.zeros(1, 32), torch.zeros(1, 32), record["eps.skip"][:1].transpose(1, 2)
    if latent == "sampled":
        z, z_emb = record["z"], mu + sigma * record["eps.emb"][..., 0]
    got = model.generate_ids(record["prompt_ids"], z, z_embedding=z_emb, z_skip=z_skip, max_new_tokens=14)
    assert torch.equal(got, record[f"{variant}.generated.{latent}"])


def test_greedy_ids_of_left_padded_prompts(load, record):
    got = load().generate_ids(
        record["left_padded.input_ids"], record["left_padded.z"], mask=record["left_padded.attention_mask"],
        max_new_tokens=14,
    )  # fmt: skip
    assert torch.equal(got, record["main.generated.left_padded"])
