"""The eager Optimus: its injections, positions, loss, schedule and generation, each against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from lmvae_fast.errors import LatentError
from lmvae_fast.reference import ReferenceOptimus, stepwise_greedy, stepwise_logits
from lmvae_fast.reference.optimus import IGNORED, optimus_betas, optimus_kl
from lmvae_fast.testing import SENTENCES, tiny_decoder, tiny_encoder, tiny_tokenizer
from lmvae_fast.training.schedule import cyclical_beta

NZ = 6


def optimus(family="gpt2", dtype=torch.float32, **options):
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    model = ReferenceOptimus(
        tiny_encoder("bert", vocab_size=size),
        tokenizer,
        tiny_decoder(family, vocab_size=size),
        tiny_tokenizer(),
        latent_dim=NZ,
        max_len=16,
        **options,
    )
    return model.eval().to(dtype)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("memory", "embedding"), [(True, True), (True, False), (False, True)])
def test_one_pass_equals_the_stepwise_oracle(family, memory, embedding):
    """Prefix visibility with one slot that is key and value, positions from 1, and a shift of every embedding."""
    model = optimus(family, memory=memory, embedding=embedding)
    z = torch.randn(3, NZ)
    ids, _ = model.token_ids(SENTENCES[:3])
    shift = model.linear_embedding(z) if embedding else None
    want = stepwise_logits(model.decoder, ids, model.memory(z), embedding_shift=shift)
    torch.testing.assert_close(model.logits(ids, z), want, rtol=0, atol=5e-5)


def test_memory_is_one_vector_as_key_and_value():
    model = optimus("llama")
    memory = model.memory(torch.randn(2, NZ))
    assert memory.shape == (3, 2, 2, 2, 1, 8)
    assert torch.equal(memory[:, 0], memory[:, 1])
    z = torch.zeros(2, NZ)
    z[:, 0] = 1
    layers = model.linear_memory.weight[:, 0].view(3, 2, 8)
    assert torch.equal(model.memory(z)[:, 0, 1, :, 0], layers)


def test_both_injections_change_the_output():
    model = optimus()
    ids, _ = model.token_ids(SENTENCES[:2])
    outputs = [model.logits(ids, scale * torch.ones(2, NZ)) for scale in (0.0, 1.0)]
    model.linear_embedding = None
    outputs.append(model.logits(ids, torch.ones(2, NZ)))
    for a, b in [(0, 1), (1, 2), (0, 2)]:
        assert (outputs[a] - outputs[b]).abs().max() > 1e-2


def test_inputs_and_labels():
    model = optimus()
    inputs, labels = model.token_ids(["the sun is a star", "water"])
    long = model.decoder_tokenizer("the sun is a star", add_special_tokens=False)["input_ids"]
    short = model.decoder_tokenizer("water", add_special_tokens=False)["input_ids"]
    assert inputs[0].tolist() == [1, *long]
    assert labels[0].tolist() == [*long, 2]
    padding = len(long) - len(short)
    assert labels[1].tolist() == [*short, 2] + [IGNORED] * padding
    assert (inputs >= 0).all()
    model.max_len = 3
    inputs, labels = model.token_ids(["the sun is a star"])
    assert labels[0].tolist() == long[:3], "a sentence that is cut has no end"
    assert inputs[0].tolist() == [1, *long[:2]]


def test_loss_is_the_sum_of_its_definition():
    """Sentence by sentence, token by token, without padding, through the stepwise oracle in fp64."""
    model = optimus(dtype=torch.float64)
    texts, beta, target = ["a cat is a kind of animal", "water"], 0.7, 0.4
    eps = torch.randn(2, NZ, dtype=torch.float64)
    for normalize in (False, True):
        out = model.loss(texts, beta=beta, target_kl=target, eps=eps, length_normalize=normalize)
        total = 0.0
        for row, text in enumerate(texts):
            mu, logvar = (part[0].detach() for part in model.encode([text]))
            z = mu + eps[row] * torch.exp(logvar / 2)
            inputs, labels = model.token_ids([text])
            logits = stepwise_logits(
                model.decoder, inputs, model.memory(z[None]), embedding_shift=model.linear_embedding(z[None])
            )
            nll = -logits[0].log_softmax(-1).gather(1, labels[0, :, None]).sum()
            nll = nll / labels.shape[1] if normalize else nll
            kl = sum(k for m, lv in zip(mu, logvar, strict=True) if (k := (m * m + math.exp(lv) - lv - 1) / 2) > target)
            torch.testing.assert_close(out.reconstruction[row], nll, rtol=1e-6, atol=0)
            torch.testing.assert_close(out.kl[row], torch.as_tensor(kl, dtype=torch.float64), rtol=1e-6, atol=1e-9)
            total = total + nll + beta * kl
        torch.testing.assert_close(out.loss, total / 2, rtol=1e-6, atol=0)


def test_kl_mask_is_hard_per_dimension_and_off_at_beta_zero():
    mu, logvar = torch.tensor([[2.0, 0.1, 1.0]]), torch.zeros(1, 3)  # KL per dimension: 2, 0.005, 0.5
    assert optimus_kl(mu, logvar, beta=1.0, target=0.5).tolist() == [2.0]  # at the target is not above it
    assert optimus_kl(mu, logvar, beta=1.0, target=0.4).tolist() == [2.5]
    torch.testing.assert_close(optimus_kl(mu, logvar, beta=0.0, target=0.5), torch.tensor([2.505]))


def test_everything_trains():
    model = optimus()
    model.loss(SENTENCES[:2], beta=1.0, target_kl=0.0).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n.startswith("linear"))


class TestSchedule:
    def test_fine_tuning_recipe(self):
        """One cycle: half at zero, a quarter climbing, a quarter at beta."""
        betas = optimus_betas(100)
        assert (betas[:50] == 0).all()
        torch.testing.assert_close(betas[50:75], torch.arange(25, dtype=torch.float64) / 25)
        assert (betas[75:] == 1).all()

    def test_cycles_start_anew(self):
        betas = optimus_betas(80, cycles=4, zero=0.25, increase=0.25, beta=0.5)
        assert torch.equal(betas.view(4, 20), betas[:20].expand(4, 20))
        assert betas[0] == 0
        assert betas[19] == 0.5

    @pytest.mark.parametrize("total", [7, 40, 97, 1000])
    @pytest.mark.parametrize(("cycles", "zero", "increase"), [(1, 0.5, 0.25), (3, 0.25, 0.25), (5, 0.1, 0.6)])
    def test_the_trainers_formula_is_the_same(self, total, cycles, zero, increase):
        betas = optimus_betas(total, cycles=cycles, zero=zero, increase=increase, beta=0.8)
        got = [cyclical_beta(i, total, beta=0.8, cycles=cycles, zero=zero, increase=increase) for i in range(total)]
        torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), betas, rtol=1e-12, atol=1e-12)


def test_generation_re_reads_the_prefix_and_stops_at_eos():
    model = optimus()
    z = torch.randn(1, NZ)
    want, _ = stepwise_greedy(
        model.decoder, torch.tensor([1]), 16, model.memory(z), embedding_shift=model.linear_embedding(z)
    )
    want = want[0].tolist()
    got = model.generate_ids(z[0])
    assert got == (want[: want.index(2)] if 2 in want else want)
    assert isinstance(model.generate(z), str)
    first = got[0]
    stopping = model.generate_ids(z, choose=lambda logits: torch.tensor([2]))
    assert stopping == []
    assert model.generate_ids(z, max_new_tokens=1) == [first]


def test_wrong_latent_width():
    with pytest.raises(LatentError, match=r"\[batch, 6\]"):
        optimus().memory(torch.randn(2, NZ + 1))
