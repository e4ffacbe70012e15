"""The preset ``optimus`` against the eager Optimus with the same weights and noise."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.errors import ConfigError
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.reference.optimus import ReferenceOptimus
from lmvae_fast.testing import SENTENCES, make_model, tiny_decoder, tiny_encoder, tiny_tokenizer
from lmvae_fast.text.tokenizer import SentenceTokenizer

TEXTS = SENTENCES[:5]


def pair(family, *, memory=True, embedding=True, **options):
    """(our model, the eager one), both in evaluation mode, with copies of the same weights."""
    torch.manual_seed(0)
    size = len(tiny_tokenizer())
    encoder, decoder = tiny_encoder("bert", vocab_size=size), tiny_decoder(family, vocab_size=size)
    reference = ReferenceOptimus(
        copy.deepcopy(encoder), tiny_tokenizer(), copy.deepcopy(decoder), tiny_tokenizer(), latent_dim=6, max_len=12,
        memory=memory, embedding=embedding,
    )  # fmt: skip
    config = lf.LMVAEConfig(
        system="optimus",
        latent_dim=6,
        max_len=12,
        projector=None if memory else "none",
        embedding_shift=embedding,
        **options,
    )
    model = lf.LMVAE(
        config, encoder=Encoder(encoder, tiny_tokenizer(), pooling="pooler", train=True),
        decoder=Decoder(decoder, SentenceTokenizer(tiny_tokenizer()), train=True),
    )  # fmt: skip
    with torch.no_grad():
        model.posterior_head.weight.copy_(reference.linear.weight)
        if memory:
            model.projector.weight.copy_(reference.linear_memory.weight)
        if embedding:
            model.embedding_shift.weight.copy_(reference.linear_embedding.weight)
    return model.eval(), reference.eval()


def named_gradients(model, reference):
    """Pairs of gradients that must be equal."""
    yield "posterior", model.posterior_head.weight.grad, reference.linear.weight.grad
    if reference.linear_memory is not None:
        yield "memory", model.projector.weight.grad, reference.linear_memory.weight.grad
    if reference.linear_embedding is not None:
        yield "embedding", model.embedding_shift.weight.grad, reference.linear_embedding.weight.grad
    for part, ours, theirs in (("encoder", model.encoder.model, reference.encoder),
                               ("decoder", model.decoder.model, reference.decoder)):  # fmt: skip
        for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            if b.grad is not None:
                yield f"{part}.{name}", a.grad, b.grad


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # one vector per head; grouped heads and rotary positions
@pytest.mark.parametrize(
    ("parts", "beta", "options"),
    [
        ({}, 0.7, {}),
        ({}, 0.0, {}),  # the mask is off
        ({"embedding": False}, 1.0, {"length_normalize": True}),
        ({"memory": False}, 1.0, {"kl_target": 0.01}),
    ],
)
def test_loss_and_every_gradient(family, parts, beta, options):
    model, reference = pair(family, **parts, **options)
    eps = torch.randn(len(TEXTS), 6, generator=torch.Generator().manual_seed(1))
    ours = model(model.make_batch(model.tokenize(TEXTS)), beta=beta, eps=eps)
    theirs = reference.loss(
        TEXTS, beta=beta, eps=eps, target_kl=options.get("kl_target", 0.5),
        length_normalize=options.get("length_normalize", False),
    )  # fmt: skip
    torch.testing.assert_close(ours.mu, theirs.mu, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.kl, theirs.kl, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = list(named_gradients(model, reference))
    assert len(gradients) > 20
    total = torch.stack([want.norm() for _, _, want in gradients]).norm()
    for name, got, want in gradients:
        # BERT's key biases have no gradient but rounding, which is measured by the whole gradient.
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-6 * total, name


def test_decoding():
    model, reference = pair("gpt2")
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    assert model.decode(z) == [reference.generate(row).strip() for row in z]


def test_start_values():
    """Three maps from N(0, 0.02^2), as the public code draws them; torch's own where nothing is said."""
    options = {"system": "optimus", "latent_dim": 64, "max_len": 12}
    for kind, deviation in (("normal", 0.02), ("uniform", 1 / math.sqrt(3 * 64))):
        model = make_model(**options, latent_init=kind)
        for module, wanted in (
            (model.projector, deviation),
            (model.embedding_shift, deviation),
            (model.posterior_head, 0.02 if kind == "normal" else 1 / math.sqrt(3 * 24)),
        ):
            assert module.weight.std().item() == pytest.approx(wanted, rel=0.1), (kind, type(module))
    with pytest.raises(ConfigError, match="latent_init"):
        make_model(**options, latent_init="zeros")


@pytest.mark.parametrize("counted", [False, True])
def test_lengths_with_the_start_token(counted):
    """A sentence's NLL over its predicted tokens, or over one more, in the loss, its gradient and in perplexity."""
    model, reference = pair("gpt2", length_normalize=True, count_start_token=counted)
    eps = torch.zeros(len(TEXTS), 6)
    batch = model.make_batch(model.tokenize(TEXTS))
    ours, theirs = model(batch, beta=0.5, eps=eps), reference.loss(TEXTS, beta=0.5, eps=eps)
    wanted = theirs.reconstruction / (batch.tokens + counted)
    torch.testing.assert_close(ours.reconstruction, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.loss, (wanted + 0.5 * theirs.kl).mean(), rtol=1e-5, atol=0)
    ours.loss.backward()
    (wanted + 0.5 * theirs.kl).mean().backward()
    torch.testing.assert_close(model.projector.weight.grad, reference.linear_memory.weight.grad, rtol=1e-4, atol=1e-6)
    found = lf.evaluate(model, TEXTS, metrics=("elbo", "perplexity"), num_importance_samples=2)
    tokens = found.tokens + counted * len(TEXTS)
    assert found.tokens == int(batch.tokens.sum()), "the figure per token stays one per predicted token"
    assert found.perplexity == pytest.approx(math.exp(-found.log_likelihood * len(TEXTS) / tokens))
    assert found.elbo_perplexity == pytest.approx(math.exp(-found.elbo * len(TEXTS) / tokens))
