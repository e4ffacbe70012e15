"""The decode engine against the step-by-step oracle, and what it promises about batches, rows and draws."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError, LatentError
from lmvae_fast.generation.engine import generate
from lmvae_fast.generation.sampling import filtered_probabilities, select_tokens
from lmvae_fast.models.greedy import greedy_ids
from lmvae_fast.models.injection import Injection
from lmvae_fast.reference.stepwise import stepwise_greedy
from tests.models.test_parallel_pass import problem
from tests.models.tiny import make_decoder, make_model


@pytest.mark.parametrize("visibility", ["prefix", "rolling", "interleaved"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_static_cache_gives_the_oracles_tokens(family, visibility):
    model, decoder = make_decoder(family)
    # Tied embeddings of a random model repeat the token they read.
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    memory, shift, residual, _ = problem(decoder, visibility, torch.float32)
    injection = Injection(visibility, memory, shift, residual).detach()
    steps = 7
    got = greedy_ids(decoder, injection, steps)
    start = torch.full((memory.shape[2],), decoder.tokenizer.bos_token_id)
    model.set_attn_implementation("eager")
    expected, _ = stepwise_greedy(
        model, start, steps, injection.memory, visibility=visibility, embedding_shift=shift, output_residual=residual
    )
    assert torch.equal(got, expected)
    assert len(set(got.flatten().tolist())) > 3  # a constant output would prove nothing


@pytest.mark.parametrize("window_family", ["gemma2", "mistral"])
@pytest.mark.parametrize("visibility", ["prefix", "interleaved"])
def test_windows_hold_in_the_cache(window_family, visibility):
    model, decoder = make_decoder(window_family, window=4)
    memory, _, _, _ = problem(decoder, visibility, torch.float32)
    injection = Injection(visibility, memory).detach()
    got = greedy_ids(decoder, injection, 7)
    model.set_attn_implementation("eager")
    start = torch.full((memory.shape[2],), decoder.tokenizer.bos_token_id)
    expected, _ = stepwise_greedy(model, start, 7, injection.memory, visibility=visibility)
    assert torch.equal(got, expected)


def end_with_a_common_token(model, z):
    """Make a token that some sentences produce midway the end token: a random model never ends one by itself."""
    ids = [out.ids for out in generate(model, z)]
    counts = torch.bincount(torch.tensor([token for row in ids for token in row[2:]]))
    model.decoder.tokenizer.eos_token_id = int(counts.argmax())


@pytest.mark.parametrize("system", ["langvae", "optimus"])
def test_text_does_not_depend_on_the_batch(system):
    """Rows refilled as sentences end, and a shrinking batch at the end, change no text; nor do they change a draw."""
    model = make_model("gpt2", system=system).eval()
    z = 2 * torch.randn(23, model.config.latent_dim)
    end_with_a_common_token(model, z)
    for options in ({}, {"do_sample": True, "seed": 5, "temperature": 0.7}):
        whole = list(generate(model, z, GenerationConfig(batch_size=64, **options)))
        assert [out.index for out in whole] == list(range(23))
        for batch_size in (1, 3, 7):
            other = list(generate(model, z, GenerationConfig(batch_size=batch_size, **options)))
            assert [out.ids for out in other] == [out.ids for out in whole]
        blocks = list(generate(model, iter(z.split(5)), GenerationConfig(batch_size=4, **options)))
        assert [out.ids for out in blocks] == [out.ids for out in whole]
    lengths = {len(out.ids) for out in whole}
    assert len(lengths) > 1, "sentences of one length would not exercise the refill"


def test_sentences_stop_at_the_end_token_and_say_so():
    model = make_model("gpt2").eval()
    z = 2 * torch.randn(40, 6)
    end_with_a_common_token(model, z)
    out = list(generate(model, z, GenerationConfig(do_sample=True, seed=1)))
    eos = model.decoder.tokenizer.eos_token_id
    assert all(eos not in item.ids for item in out)
    assert any(item.finished for item in out) and any(not item.finished for item in out)
    assert all(len(item.ids) == model.config.max_len for item in out if not item.finished)


def test_training_mode_is_left_as_it_was_and_dropout_is_off():
    model = make_model("gpt2").train()
    z = torch.randn(3, 6)
    assert model.decode(z) == model.decode(z)
    assert model.training and model.projector.training


def test_greedy_decode_of_the_public_call_equals_the_bare_loop():
    model = make_model("llama").eval()
    z = 2 * torch.randn(4, 6)
    with torch.no_grad():
        ids = greedy_ids(model.decoder, model.inject(z), model.config.max_len)
    eos = model.decoder.tokenizer.eos_token_id
    cut = [row[: row.index(eos)] if eos in row else row for row in ids.tolist()]
    assert [out.ids for out in generate(model, z)] == cut


@pytest.mark.parametrize(
    "z", [torch.zeros(2, 5), torch.zeros(6), torch.full((2, 6), float("nan")), torch.zeros(2, 6, dtype=torch.int64)]
)
def test_bad_latents_are_refused_before_anything_is_decoded(z):
    model = make_model("gpt2")
    with pytest.raises(LatentError, match=r"allowed|row"):
        generate(model, z)


def test_more_tokens_than_slots_are_refused():
    model = make_model("gpt2")
    with pytest.raises(ConfigError, match="max_len=9"):
        model.decode(torch.zeros(1, 6), max_new_tokens=10)
    assert len(model.decode(torch.zeros(1, 6), max_new_tokens=3)) == 1
    with pytest.raises(ConfigError, match="128 positions"):
        make_model("gpt2", system="optimus").decode(torch.zeros(1, 6), max_new_tokens=500)


def test_empty_input_gives_nothing():
    assert make_model("gpt2").decode(torch.zeros(0, 6)) == []


def test_filters_against_their_definitions():
    logits = torch.randn(5, 31)
    probabilities = torch.softmax(logits / 0.7, -1)
    kept = filtered_probabilities(logits, temperature=0.7, top_k=4)
    assert (kept > 0).sum(-1).tolist() == [4] * 5
    for row in range(5):
        order = probabilities[row].argsort(descending=True).tolist()
        total, nucleus = 0.0, []
        for token in order:
            nucleus.append(token)
            total += probabilities[row, token].item()
            if total >= 0.6:
                break
        got = filtered_probabilities(logits, temperature=0.7, top_p=0.6)[row]
        assert sorted(nucleus) == got.nonzero().flatten().tolist()
        torch.testing.assert_close(got[nucleus], probabilities[row, nucleus] / total)


def test_draws_follow_the_probabilities():
    logits = torch.randn(1, 12)
    expected = torch.softmax(logits[0], -1)
    rows = 20000
    tokens = select_tokens(
        logits.expand(rows, -1), GenerationConfig(do_sample=True), seed=3, sentence=torch.arange(rows),
        step=torch.zeros(rows, dtype=torch.int64),
    )  # fmt: skip
    frequency = torch.bincount(tokens, minlength=12) / rows
    # five standard deviations of a binomial frequency
    assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / rows).sqrt() + 1e-4).all()
