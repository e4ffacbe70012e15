"""The eager CVAE where no public record says what is right: its GPT-2 form, from its description, and bad input."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from lmvae_fast.errors import CheckpointError, ConfigError, DataError, LatentError, UnsupportedDecoderError
from lmvae_fast.reference.cvae import CVAENoise, ReferenceCVAE, load_checkpoint
from lmvae_fast.reference.cvae_parts import CVAESettings
from lmvae_fast.reference.cvae_text import CVAEBatch, collate, left_padded
from lmvae_fast.reference.stepwise import stepwise_greedy, stepwise_logits
from lmvae_fast.testing import perturbed, tiny_decoder, tiny_tokenizer


class Item(NamedTuple):
    prompt: str
    response: str


ITEMS = [Item("the sun is", " a star"), Item("the sun is", " a kind of light to live"), Item("the sun is", " food")]


def build(family="gpt2", **settings):
    """A small CVAE whose new parameters are no longer as they begin, with a tokenizer."""
    tokenizer = tiny_tokenizer()
    decoder = tiny_decoder(family, vocab_size=len(tokenizer))
    defaults = {"latent_dim": 8, "queries": 2, "slots": 3, "stage": 1}
    return perturbed(lambda: ReferenceCVAE(decoder, tokenizer, CVAESettings(**{**defaults, **settings})), seed=3)


@pytest.fixture(scope="module")
def gpt2():
    return build()


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_gpt2_encoder_does_not_see_padding(bidirectional):
    model = build(bidirectional=bidirectional)
    batch = model.batch(ITEMS)
    mu, logvar = model.encode(batch)
    for row, (ids, mask) in enumerate(zip(batch.encoder_ids, batch.encoder_mask, strict=True)):
        own = ids[mask == 1][None]
        alone = model.latent_encoder(own, torch.ones_like(own))
        torch.testing.assert_close(torch.cat(alone), torch.stack([mu[row], logvar[row]]), rtol=1e-4, atol=1e-5)


def test_the_gpt2_encoder_sees_words_without_positions_and_later_ones_where_bidirectional():
    """Without positions, a bidirectional encoder cannot tell orders apart; a causal one can."""
    ids = torch.tensor([[5, 9, 12, 30, 2]])
    for bidirectional in (True, False):
        encoder = build(bidirectional=bidirectional).latent_encoder
        got = [encoder(order, torch.ones_like(ids))[0] for order in (ids, ids[:, [2, 0, 1, 3, 4]])]
        assert torch.allclose(*got, atol=1e-5) is bidirectional


def test_the_memory_of_gpt2_is_its_own_projections_without_positions(gpt2):
    z = torch.randn(2, 8)
    memory = gpt2.memory(z)
    assert memory.shape == (3, 2, 2, 4, 3, 8)
    adapter = gpt2.latent_decoder.latent_translators[1]
    states = adapter.ln(adapter.z2h(z).view(2, 3, 32))
    weight, bias = adapter.attn.c_attn.weight, adapter.attn.c_attn.bias
    for which, part in ((0, slice(32, 64)), (1, slice(64, 96))):
        want = (states @ weight[:, part] + bias[part]).view(2, 3, 4, 8)
        torch.testing.assert_close(memory[1, which].transpose(1, 2), want)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_loss_is_the_likelihood_that_the_stepwise_decoder_gives(family):
    model = build(family, vae_type="Vanilla", gskip=0, skip=1)
    batch = model.batch(ITEMS)
    out = model.loss(batch)
    decoder = tiny_decoder(family, vocab_size=320)
    decoder.load_state_dict({"lm_head.weight": model.latent_decoder.lm_head.weight}, strict=False)
    base = "transformer" if family == "gpt2" else "model"
    getattr(decoder, base).load_state_dict(getattr(model.latent_decoder, base).state_dict())
    with torch.no_grad():
        decoder.lm_head.weight = torch.nn.Parameter(model.latent_decoder.lm_head.weight)
    logits = stepwise_logits(decoder, batch.input_ids, model.memory(out.z), output_residual=out.residual)
    for row, (labels, want) in enumerate(zip(batch.labels, out.nll, strict=True)):
        answered = labels[1:] != -100
        picked = logits[row, :-1][answered].log_softmax(-1).gather(1, labels[1:][answered][:, None])
        assert abs(-picked.sum() / want - 1) < 1e-4
    assert out.loss_lm == out.nll.mean() and out.loss == out.loss_lm + out.loss_kl


def test_the_norm_of_gpt2s_gskip_has_no_weights_and_its_value_is_zero(gpt2):
    zs = torch.randn(2, 32, 8)
    states = gpt2.latent_decoder.skip(zs)
    torch.testing.assert_close(states.mean(-1), torch.zeros(2, 32), atol=1e-5, rtol=0)
    torch.testing.assert_close(states.var(-1, correction=0), torch.ones(2, 32), atol=1e-3, rtol=0)
    residual = gpt2.residual(zs.requires_grad_())
    assert not residual.any()
    (residual * torch.randn(32)).sum().backward()
    assert zs.grad.abs().max() > 1e-4


def test_contrast_scores_every_latent_against_every_response():
    model, plain = build(contrast=True), build()
    batch = model.batch(ITEMS)
    noise = CVAENoise(z=torch.randn(3, 8, 1), skip=torch.randn(3, 8, 32), kl=torch.randn(3, 8, 16))
    out, alone = model.loss(batch, noise), plain.loss(batch, noise)
    assert alone.loss_contrast == 0
    torch.testing.assert_close(out.nll, alone.nll)
    nll = torch.empty(3, 3)  # [response, turn]
    for turn in range(3):
        mu, logvar = out.mu.roll(turn, 0), out.logvar.roll(turn, 0)
        z = mu + torch.exp(0.5 * logvar) * noise.z[..., 0]
        positions = torch.arange(3, 3 + batch.input_ids.shape[1]).expand(3, -1)
        states = model.hidden(batch.input_ids, model.cache(model.memory(z)), positions)
        scores = model.latent_decoder.lm_head(states)[:, :-1].log_softmax(-1)
        labels = batch.labels[:, 1:]
        picked = scores.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        nll[:, turn] = -(picked * (labels != -100)).sum(1)
    torch.testing.assert_close(out.loss_contrast, (nll[:, 0] + torch.logsumexp(-nll, 1)).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, alone.loss + out.loss_contrast)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_left_changes_no_answer(family):
    model = build(family)
    z = torch.randn(2, 8)
    rows = [[5, 9, 12, 30, 7], [8, 4]]
    ids, mask = left_padded(rows, pad=2)
    together = model.generate_ids(ids, z, mask=mask, max_new_tokens=6, min_new_tokens=6)
    for row, prompt in enumerate(rows):
        alone = model.generate_ids(torch.tensor([prompt]), z[row : row + 1], max_new_tokens=6, min_new_tokens=6)
        assert torch.equal(together[row, -6:], alone[0, -6:])


def test_generation_reads_the_memory_as_the_stepwise_decoder_does(gpt2):
    z = torch.randn(2, 8)
    first = torch.tensor([5, 5])
    decoder = tiny_decoder("gpt2", vocab_size=320)
    decoder.transformer.load_state_dict(gpt2.latent_decoder.transformer.state_dict())
    decoder.lm_head.weight = torch.nn.Parameter(gpt2.latent_decoder.lm_head.weight.detach())
    want, _ = stepwise_greedy(decoder, first, 5, gpt2.memory(z))
    got = gpt2.generate_ids(first[:, None], z, max_new_tokens=5, min_new_tokens=5)
    assert not (want == 2).any()  # nothing ends early, so the two can be compared
    assert torch.equal(got[:, 1:], want)


def test_answers_end_and_are_two_tokens_long_at_least():
    model = build()
    with torch.no_grad():  # the end-of-text (2) is the likeliest token at once, the first of all others behind it
        norm, head = model.latent_decoder.transformer.ln_f, model.latent_decoder.lm_head.weight
        norm.weight.zero_()
        head.zero_()
        head[2] = norm.bias
    got = model.generate_ids(torch.tensor([[5]]), torch.randn(4, 8), max_new_tokens=6)
    assert got.tolist() == [[5, 0, 0, 2]] * 4


# Files ----------------------------------------------------------------------------------------------------------------

GPT2_NAMES = {
    "latent_encoder.latent_queries", "latent_encoder.wte.weight", "latent_encoder.ln_input.bias",
    "latent_encoder.blocks.1.attn.c_attn.weight", "latent_encoder.ln_output.weight", "latent_encoder.h2z.2.bias",
    "latent_decoder.latent_translators.2.z2h.0.weight", "latent_decoder.latent_translators.0.ln.weight",
    "latent_decoder.latent_translators.1.attn.c_attn.bias", "latent_decoder.skip_connection.2.weight",
    "latent_decoder.transformer.wpe.weight", "latent_decoder.lm_head.weight",
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(gpt2, tmp_path_factory):
    """A folder of the GPT-2 form as the public code saves it, and the base model's folder."""
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("cvae")
    decoder = tiny_decoder("gpt2", vocab_size=320)
    decoder.save_pretrained(base)
    gpt2.tokenizer.save_pretrained(base)
    config = {
        **decoder.config.to_dict(), "architectures": ["GPT2ForCVAE"], "num_q": 2, "dim_z": 8, "num_p": 3,
        "num_latent_encoder_layers": 2, "frozen_pretrained": 1, "use_standard_prior": 1, "vae_type": "DG-VAE",
        "add_contra_loss": 0, "add_skip_connection": 0, "add_ghost_skip_connection": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, default=str))
    state = {name: value.detach().clone() for name, value in gpt2.state_dict().items()}
    state["latent_decoder.transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # the mask that old files carry
    save_file(state, folder / "model.safetensors")
    return folder, base


def test_a_gpt2_folder_loads(gpt2, saved):
    folder, base = saved
    model = load_checkpoint(folder, base_model=base)
    assert set(model.state_dict()) >= GPT2_NAMES
    assert model.settings == gpt2.settings
    batch = gpt2.batch(ITEMS)
    noise = {"decode_z": torch.randn(3, 8, 1), "kl": torch.randn(3, 8, 16)}
    torch.testing.assert_close(model.loss(batch, noise).loss, gpt2.loss(batch, noise).loss)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        name
        for name in model.state_dict()
        if not name.startswith(("latent_decoder.transformer.", "latent_decoder.lm_head."))
    }


def test_a_folder_without_all_parameters_is_refused(gpt2, saved, tmp_path):
    folder, base = saved
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="there is no file"):
        load_checkpoint(tmp_path, base_model=base)
    save_file({"latent_encoder.latent_queries": torch.zeros(1, 2, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing"):
        load_checkpoint(tmp_path, base_model=base)


# Bad input ------------------------------------------------------------------------------------------------------------


def test_bad_texts_are_refused(gpt2):
    limits = {"max_prompt": 8, "max_response": 8}
    with pytest.raises(DataError, match="one prompt"):
        collate([Item("a", " b"), Item("c", " d")], gpt2.tokenizer, **limits)
    with pytest.raises(DataError, match="response is empty"):
        collate([Item("a", "")], gpt2.tokenizer, **limits)
    with pytest.raises(DataError, match="prompt has no tokens"):
        collate([Item("", "a")], gpt2.tokenizer, **limits)
    with pytest.raises(ConfigError, match="tokenizer"):
        ReferenceCVAE(tiny_decoder("gpt2"), None).loss([Item("a", " b")])


def test_bad_settings_latents_and_decoders_are_refused(gpt2):
    for changes in ({"vae_type": "VAE"}, {"stage": 3}, {"padding": "none"}, {"gskip": 3}, {"queries": 3}):
        with pytest.raises(ConfigError):
            CVAESettings(**changes)
    with pytest.raises(ConfigError, match="GPT-2 form"):
        build(vae_type="EMB-VAE")
    with pytest.raises(ConfigError, match="contrast"):
        build("llama", contrast=True)
    with pytest.raises(UnsupportedDecoderError, match="k_norm"):
        build("qwen3")
    with pytest.raises(UnsupportedDecoderError, match="OPT"):
        build("opt")
    with pytest.raises(LatentError, match="wrong shape"):
        gpt2.memory(torch.zeros(2, 7))
    with pytest.raises(LatentError, match="does not fit"):
        gpt2.loss(gpt2.batch(ITEMS), {"eps.kl": torch.zeros(2, 8, 16)})


def test_a_batch_can_be_given_as_ids(gpt2):
    batch = gpt2.batch(ITEMS)
    assert isinstance(batch, CVAEBatch)
    torch.testing.assert_close(gpt2.encode(ITEMS), gpt2.encode(batch))
