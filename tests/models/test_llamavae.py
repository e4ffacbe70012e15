"""The preset ``llamavae`` against the eager LlaMaVAE with the same weights and noise; its encoder's folder; what trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lmvae_fast as lf
from lmvae_fast.errors import ConfigError
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.decoder.tuning import Tuning
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.sentence_modules import write_modules
from lmvae_fast.models.systems import resolve
from lmvae_fast.reference.llamavae import ReferenceLlamaVAE
from lmvae_fast.testing import SENTENCES, make_decoder, tiny_decoder, tiny_encoder, tiny_tokenizer
from lmvae_fast.text.tokenizer import SentenceTokenizer

TEXTS = SENTENCES[:5]


@pytest.fixture(scope="module")
def sentence_t5(tmp_path_factory):
    """A folder as sentence-transformers writes sentence-T5: (folder, its dense layer)."""
    folder = tmp_path_factory.mktemp("encoder") / "sentence-t5"
    torch.manual_seed(3)
    dense = nn.Linear(24, 20, bias=False)
    encoder = tiny_encoder("t5", vocab_size=len(tiny_tokenizer()))
    encoder.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    layers = nn.Sequential(dense)
    write_modules(folder, pooling="mean", normalize=True, width=24, dense=layers, max_tokens=64, lower=False)
    return folder, dense


def pair(family, sentence_t5, *, hidden=None, **options):
    """(our model, the eager one), both in evaluation mode, with copies of the same weights."""
    torch.manual_seed(0)
    folder, dense = sentence_t5
    size = len(tiny_tokenizer())
    decoder = tiny_decoder(family, vocab_size=size)
    reference = ReferenceLlamaVAE(
        tiny_encoder("t5", vocab_size=size), tiny_tokenizer(), copy.deepcopy(dense), copy.deepcopy(decoder), tiny_tokenizer(),
        latent_dim=6, max_len=12, hidden=hidden,
    )  # fmt: skip
    projector = {} if hidden is None else {"projector": "mlp", "projector_hidden": hidden}
    config = lf.LMVAEConfig(system="llamavae", encoder=str(folder), latent_dim=6, max_len=12, **projector, **options)
    model = lf.LMVAE(
        config, decoder=Decoder(decoder, SentenceTokenizer(tiny_tokenizer()), train=True, tuning=Tuning("embeddings"))
    )
    with torch.no_grad():
        reference.linear.weight.mul_(6)  # so that the KL of some dimensions passes 1 nat, and of others does not
        model.posterior_head.weight.copy_(reference.linear.weight)
        if hidden is None:
            model.projector.weight.copy_(reference.linear_memory.weight)
        else:
            first, last = reference.mlp_memory[0], reference.mlp_memory[2]
            model.projector.hidden.weight.copy_(first.weight)
            model.projector.hidden.bias.copy_(first.bias)
            model.projector.weight.copy_(last.weight.view_as(model.projector.weight))
            model.projector.bias.copy_(last.bias.view_as(model.projector.bias))
    return model.eval(), reference.eval()


def named_gradients(model, reference):
    """Pairs of gradients that must be equal."""
    yield "posterior", model.posterior_head.weight.grad, reference.linear.weight.grad
    if reference.mlp_memory is None:
        yield "memory", model.projector.weight.grad, reference.linear_memory.weight.grad
    else:
        first, last = reference.mlp_memory[0], reference.mlp_memory[2]
        yield "hidden", model.projector.hidden.weight.grad, first.weight.grad
        yield "hidden bias", model.projector.hidden.bias.grad, first.bias.grad
        yield "memory", model.projector.weight.grad, last.weight.grad.view_as(model.projector.weight)
        yield "memory bias", model.projector.bias.grad, last.bias.grad.view_as(model.projector.bias)
    for (name, a), (_, b) in zip(
        model.decoder.model.named_parameters(), reference.decoder.named_parameters(), strict=True
    ):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            yield name, a.grad, b.grad


@pytest.mark.parametrize(
    "family", ["gpt2", "llama"]
)  # tied embedding and head; untied, grouped heads, rotary positions
@pytest.mark.parametrize("hidden", [None, 11])
@pytest.mark.parametrize("beta", [0.7, 0.0])
def test_loss_and_every_gradient(sentence_t5, family, hidden, beta):
    model, reference = pair(family, sentence_t5, hidden=hidden)
    eps = torch.randn(len(TEXTS), 6, generator=torch.Generator().manual_seed(1))
    ours = model(model.make_batch(model.tokenize(TEXTS)), beta=beta, eps=eps)
    theirs = reference.loss(TEXTS, beta=beta, eps=eps)
    per_dim = 0.5 * (theirs.mu.square() + theirs.logvar.exp() - theirs.logvar - 1)
    assert bool((per_dim > 1).any()) and bool((per_dim < 1).any())
    torch.testing.assert_close(ours.mu, theirs.mu, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.kl, theirs.kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = list(named_gradients(model, reference))
    trained = {"gpt2": 1, "llama": 2}[family]  # one matrix that is both, or two
    assert len(gradients) == (2 if hidden is None else 5) + trained
    for name, got, want in gradients:
        assert (got - want).norm() <= 1e-5 * want.norm(), name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("hidden", [None, 11])
def test_greedy_ids(sentence_t5, family, hidden):
    model, reference = pair(family, sentence_t5, hidden=hidden)
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    ours = [out.ids for out in lf.generate(model, z)]
    assert ours == [reference.generate_ids(row) for row in z]
    assert model.decode(z) == [reference.generate(row).strip() for row in z]


def test_what_the_preset_says(sentence_t5):
    config = resolve(lf.LMVAEConfig(system="llamavae", encoder=str(sentence_t5[0])))
    assert (config.visibility, config.slots, config.projector, config.embedding_shift) == ("prefix", 1, "shared", False)
    assert (config.pooling, config.normalize, config.kl_mode, config.kl_target) == ("mean", True, "dim_threshold", 1.0)
    assert (config.train_encoder, config.train_decoder, config.decoder_part) == (False, True, "embeddings")
    frozen = resolve(lf.LMVAEConfig(system="llamavae", train_decoder=False))
    assert not frozen.train_decoder and frozen.decoder_part == "all"
    assert resolve(lf.LMVAEConfig(system="llamavae", decoder_part="lora")).decoder_part == "lora"
    assert resolve(lf.LMVAEConfig()).decoder_part == "all"
    with pytest.raises(ConfigError, match="train_decoder=False"):
        lf.LMVAEConfig(system="llamavae", decoder_part="embeddings", train_decoder=False)


def test_it_trains_embedding_and_head_and_is_saved_with_its_encoder(sentence_t5, tmp_path):
    model, _ = pair("llama", sentence_t5)
    names = {name for name, value in model.named_parameters() if value.requires_grad}
    assert names == {
        "posterior_head.weight", "projector.weight", "decoder.model.model.embed_tokens.weight", "decoder.model.lm_head.weight",
    }  # fmt: skip
    before = {name: value.clone() for name, value in model.named_parameters()}
    config = lf.TrainConfig(
        output_dir=str(tmp_path / "run"), max_steps=4, batch_size=4, learning_rate=0.01, beta_cycles=1, tensorboard=False,
        progress=False,
    )  # fmt: skip
    lf.train(model, list(SENTENCES), None, config)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) != (name in names), name
    model.save_pretrained(tmp_path / "model", include_frozen=True)
    again = lf.LMVAE.from_pretrained(tmp_path / "model")
    assert again.encoder.dense is not None and again.encoder.max_tokens == 64
    assert torch.equal(again.encode(TEXTS).mu, model.eval().encode(TEXTS).mu)
    z = torch.randn(2, 6)
    assert again.decode(z) == model.decode(z)
    assert again.encoder.fingerprint() == model.encoder.fingerprint()


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "qwen3"])
def test_other_decoders(sentence_t5, family):
    """Scaled embeddings, a soft-capped head; untied heads; memory of fewer heads: each learns."""
    config = lf.LMVAEConfig(system="llamavae", encoder=str(sentence_t5[0]), latent_dim=6, max_len=12)
    _, decoder = make_decoder(family, train=True, tuning=Tuning("embeddings"))
    model = lf.LMVAE(config, decoder=decoder)
    batch = model.make_batch(model.tokenize(TEXTS))
    out = model(batch, beta=1.0, seed=0)
    out.loss.backward()
    head = model.decoder.model.get_output_embeddings().weight
    assert head.grad is not None and bool(torch.isfinite(head.grad).all()) and float(head.grad.norm()) > 0
    assert model.decoder.model.get_input_embeddings().weight.grad is not None
    with torch.no_grad():
        for value in model.parameters():
            if value.grad is not None:
                value -= 1e-3 * value.grad
        assert model(batch, beta=1.0, seed=0).loss < out.loss


def test_an_encoder_without_dense_is_the_transformer(sentence_t5, tmp_path):
    tiny_encoder("t5", vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    plain = Encoder.load(str(tmp_path), dtype=torch.float32)
    assert plain.dense is None and plain.width == 24
    assert plain.fingerprint() != Encoder.load(str(sentence_t5[0]), dtype=torch.float32).fingerprint()
