"""What the golden records of LangVAE do not reach: padding, labels, pooling, teacher forcing, the loss by hand."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.errors import ConfigError, LatentError
from lmvae_fast.reference import ReferenceLangVAE, stepwise_logits
from lmvae_fast.reference.langvae import langvae_loss, pool, pool_annotations
from lmvae_fast.testing import tiny_decoder, tiny_encoder, tiny_tokenizer

NZ, MAX_LEN, EOS = 5, 8, 2
TEXTS = ["a cat is a kind of animal", "water", "the sun is a star"]


def langvae(decoder="gpt2", encoder="bert", **options):
    size = len(tiny_tokenizer())
    model = ReferenceLangVAE(
        tiny_encoder(encoder, vocab_size=size),
        tiny_tokenizer(),
        tiny_decoder(decoder, vocab_size=size),
        tiny_tokenizer(),
        latent_dim=NZ,
        max_len=MAX_LEN,
        **options,
    )
    return model.eval()


def test_only_posterior_head_and_projector_train_and_parts_stay_in_eval():
    model = langvae().train()
    assert not model.encoder.training
    assert not model.decoder.training
    assert model.training
    trainable = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"linear", "context_hidden"}


def test_dropout_acts_on_the_memory_in_training_only():
    model = langvae(dropout=0.5)
    z = torch.randn(2, NZ)
    assert torch.equal(model.memory(z), model.memory(z))
    kept = model.memory(z)
    noisy = model.train().memory(z)
    dropped = noisy == 0
    assert 0.4 < dropped.float().mean() < 0.6
    torch.testing.assert_close(noisy[~dropped], 2 * kept[~dropped])


def test_memory_rows_are_key_value_then_head_then_slot():
    model = langvae("llama")
    z = torch.randn(1, NZ)
    flat = model.context_hidden[1](z)[0]
    memory = model.memory(z)
    assert memory.shape == (3, 2, 1, 2, MAX_LEN + 1, 8)
    head, slot, dim = 1, 4, 3
    for kind in (0, 1):
        index = ((kind * 2 + head) * (MAX_LEN + 1) + slot) * 8 + dim
        assert memory[1, kind, 0, head, slot, dim] == flat[index]


def test_targets_are_padded_with_eos_and_have_none_of_their_own():
    model = langvae()
    ids = model.target_ids(TEXTS)
    lengths = [len(model.decoder_tokenizer(text)["input_ids"]) for text in TEXTS]
    assert ids.shape == (3, max(lengths))
    for row, length in zip(ids.tolist(), lengths, strict=True):
        assert EOS not in row[:length]
        assert set(row[length:]) <= {EOS}


def test_encoding_does_not_depend_on_the_neighbours():
    model = langvae()
    together, _ = model.encode(TEXTS)
    alone = torch.cat([model.encode([text])[0] for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_last_slot_is_never_seen():
    model = langvae()
    z = torch.randn(2, NZ)
    before = model.decode_probabilities(z)
    with torch.no_grad():
        for layer in model.context_hidden:
            layer.bias.view(2, 4, MAX_LEN + 1, 8)[:, :, -1] += 10
    assert torch.equal(model.decode_probabilities(z), before)


def test_released_loss_by_hand():
    """Each sentence's token count times the mean over sentences of the total NLL, padding and all."""
    torch.manual_seed(1)
    probabilities = torch.randn(2, 3, 7).softmax(-1)
    targets = torch.tensor([[3, 4, 5], [6, EOS, EOS]])
    mu, logvar = torch.tensor([[2.0, 0.0], [0.1, 0.0]]), torch.zeros(2, 2)  # KL 2.0 and 0.005
    nll = [[-probabilities[b, s, targets[b, s]].log().item() for s in range(3)] for b in range(2)]
    total = sum(map(sum, nll))
    options = {"pad_token_id": EOS, "beta": 0.5}
    loss, reconstruction, kl = langvae_loss(
        probabilities, targets, mu, logvar, target_kl=1.0, objective="langvae-0.6", **options
    )
    assert reconstruction.item() == pytest.approx((total * 3 / 2 + total * 1 / 2) / 2, rel=1e-6)
    assert kl.item() == pytest.approx(0.5 * 2.0 / 2, rel=1e-6)
    assert loss.item() == pytest.approx(reconstruction.item() + kl.item(), rel=1e-6)
    _, meant, kl = langvae_loss(probabilities, targets, mu, logvar, target_kl=0.0, objective="elbo", **options)
    assert meant.item() == pytest.approx((sum(nll[0]) + nll[1][0]) / 2, rel=1e-6)
    assert kl.item() == pytest.approx(0.5 * 2.005 / 2, rel=1e-6)
    with pytest.raises(ConfigError, match="objective"):
        langvae_loss(probabilities, targets, mu, logvar, target_kl=0.0, objective="elbo-ish", **options)


def test_impossible_tokens_have_a_finite_loss():
    probabilities = torch.zeros(1, 2, 4)
    probabilities[..., 0] = 1
    targets = torch.tensor([[1, 3]])
    zeros = torch.zeros(1, 1)
    loss, *_ = langvae_loss(
        probabilities, targets, zeros, zeros, pad_token_id=EOS, beta=1.0, target_kl=0.0, objective="elbo"
    )
    assert loss.item() == pytest.approx(-2 * torch.log(torch.tensor(torch.finfo(torch.float32).tiny * 10)).item())


def test_teacher_forcing_reads_the_sentence():
    model = langvae()
    eps = torch.zeros(3, NZ)
    out = model.loss(TEXTS, beta=1.0, eps=eps, objective="elbo", teacher_forcing=True)
    read = torch.cat([torch.full((3, 1), 1), out.target_ids[:, :-1]], dim=1)
    logits = stepwise_logits(model.decoder, read, model.memory(out.z), visibility="rolling")
    torch.testing.assert_close(out.probabilities, logits.softmax(-1))
    free = model.loss(TEXTS, beta=1.0, eps=eps, objective="elbo")
    assert (out.probabilities - free.probabilities).abs().max() > 1e-3
    assert torch.equal(out.probabilities[:, 0], free.probabilities[:, 0]), "both begin with bos"


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_looks_at_real_tokens_only(side):
    states = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0] if side == "right" else [0, 0, 1, 1]])
    real = [states[0], states[1, :2] if side == "right" else states[1, 2:]]
    torch.testing.assert_close(pool(states, mask, "mean"), torch.stack([part.mean(0) for part in real]))
    torch.testing.assert_close(pool(states, mask, "last"), torch.stack([part[-1] for part in real]))
    torch.testing.assert_close(pool(states, mask, "cls"), states[:, 0])
    with pytest.raises(ConfigError, match="pooling"):
        pool(states, mask, "max")


@pytest.mark.parametrize(("encoder", "pooling"), [("bert", "cls"), ("t5", "mean"), ("qwen2", "last")])
def test_encoders_and_normalisation(encoder, pooling):
    model = langvae(encoder=encoder, pooling=pooling, normalize=True)
    features = model.pooled(model.target_ids(TEXTS))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert model.encode(TEXTS)[0].shape == (3, NZ)


def test_labels_enter_the_posterior_and_the_conditional_decoder():
    one_hot = torch.zeros(2, 4, 3)
    one_hot[0, 0, 1] = one_hot[0, 3, 2] = one_hot[1, 1, 0] = 1
    labels = pool_annotations(one_hot)
    torch.testing.assert_close(labels, torch.tensor([[0.0, 0.1, 1.0], [0.4, 0.0, 0.0]]) / 4)
    model = langvae(annotation_size=3, conditional=True)
    assert model.linear.weight.shape == (2 * NZ, 24 + 3)
    assert model.context_hidden[0].weight.shape[1] == NZ + 3
    out = model.loss(TEXTS[:2], beta=1.0, annotations=labels, eps=torch.zeros(2, NZ))
    other = model.loss(TEXTS[:2], beta=1.0, annotations=2 * labels, eps=torch.zeros(2, NZ))
    assert (out.mu - other.mu).abs().max() > 1e-3
    z = torch.zeros(2, NZ)
    assert (model.memory(z, labels) - model.memory(z, 2 * labels)).abs().max() > 1e-3


def test_wrong_latent_width():
    with pytest.raises(LatentError, match=r"\[batch, 5\]"):
        langvae().decode_ids(torch.zeros(1, NZ + 1))
