"""The decode engine against the step-by-step oracle, and what it promises about batches, rows and draws."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError, DataError, LatentError
from lmvae_fast.generation import engine
from lmvae_fast.generation.decode_rows import Rows, Start
from lmvae_fast.generation.engine import generate
from lmvae_fast.models.free_running import greedy_ids
from lmvae_fast.models.injection import Injection
from lmvae_fast.reference.stepwise import stepwise_greedy
from lmvae_fast.testing import make_decoder, make_model
from tests.models.test_parallel_pass import problem


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


def test_looking_seldom_changes_nothing(monkeypatch):
    """On a GPU the host looks at every eighth step only: rows that have ended read on without effect."""
    model = make_model("gpt2").eval()
    z = 2 * torch.randn(23, 6)
    end_with_a_common_token(model, z)
    config = GenerationConfig(batch_size=5, do_sample=True, seed=3, repetition_penalty=1.1)
    expected = list(generate(model, z, config))
    for steps in (2, 8, 50):
        monkeypatch.setitem(engine.STEPS_PER_LOOK, "cpu", steps)
        assert list(generate(model, z, config)) == expected


def test_a_draw_goes_by_the_number_of_its_latent_where_one_is_given():
    model = make_model("gpt2", latent_dim=4, max_len=8).eval()
    z = 2 * torch.randn(9, 4)
    config = GenerationConfig(do_sample=True, seed=5, num_samples=2, batch_size=4)
    whole = [out.ids for out in generate(model, z, config)]
    order = torch.randperm(9).tolist()
    mixed = list(generate(model, z[order], config, numbers=order))
    assert [(out.index, out.sample) for out in mixed] == [(row, sample) for row in range(9) for sample in range(2)]
    assert [out.ids for out in mixed] == [whole[2 * row + sample] for row in order for sample in range(2)]
    with pytest.raises(DataError, match="numbers"):
        generate(model, z, config, numbers=order[:3])


def test_several_samples_per_latent():
    model = make_model("gpt2").eval()
    z = 2 * torch.randn(7, 6)
    end_with_a_common_token(model, z)
    whole = list(generate(model, z, GenerationConfig(do_sample=True, seed=3, num_samples=3)))
    assert [(out.index, out.sample) for out in whole] == [(i, s) for i in range(7) for s in range(3)]
    for batch_size in (1, 4):
        config = GenerationConfig(do_sample=True, seed=3, num_samples=3, batch_size=batch_size)
        assert list(generate(model, z, config)) == whole
    assert len({tuple(out.ids) for out in whole}) > 10
    with pytest.raises(ConfigError, match="num_samples"):
        GenerationConfig(num_samples=2)


@pytest.mark.parametrize("system", ["langvae", "optimus"])
def test_a_prompt_is_read_before_the_sentence(system):
    """What a greedy sentence itself began with, given as a prompt, changes nothing; another beginning is kept."""
    model = make_model("gpt2", system=system).eval()
    z = 2 * torch.randn(6, 6)
    free = list(generate(model, z))
    texts = ["the sun" if row % 2 else "" for row in range(6)]
    prompts = model.decoder.tokenizer.encode(texts)
    got = list(generate(model, z, GenerationConfig(batch_size=4, max_new_tokens=5), prompts=texts))
    for row, out in enumerate(got):
        assert len(out.ids) <= 5
        if row % 2:
            assert out.text.startswith("the sun")
            with torch.no_grad():
                start = torch.tensor([[model.decoder.tokenizer.bos_token_id, *prompts[row], *out.ids]])
                tokens = model.decoder.tokenizer
                assert teacher_forced(model, z[row : row + 1], start)[len(prompts[row]) :][: len(out.ids)] == out.ids
                assert tokens.decode([[*prompts[row], *out.ids]])[0].strip() == out.text
        else:
            assert out.ids == free[row].ids[:5]
    one_for_all = list(generate(model, z, GenerationConfig(max_new_tokens=5), prompts="the sun"))
    assert [one_for_all[row] for row in (1, 3, 5)] == [got[row] for row in (1, 3, 5)]


def teacher_forced(model, z, ids):
    """The most probable token behind each of ids [1, S], in one parallel pass."""
    length = ids.shape[1]
    hidden = model.decoder.hidden(
        ids[0], model.inject(z), cu_seqlens=torch.tensor([0, length], dtype=torch.int32), max_seqlen=length,
        rows=torch.zeros(length, dtype=torch.int64), token_index=torch.arange(length),
    )  # fmt: skip
    return model.decoder.logits(hidden).argmax(-1).tolist()


def test_prompts_that_do_not_fit_are_refused():
    model = make_model("gpt2")
    with pytest.raises(ConfigError, match="prompt"):
        generate(model, torch.zeros(1, 6), prompts="the sun " * 12)
    with pytest.raises(ConfigError, match="max_len=9"):
        generate(model, torch.zeros(1, 6), GenerationConfig(max_new_tokens=9), prompts="the sun")
    optimus = make_model("gpt2", system="optimus")
    with pytest.raises(ConfigError, match="128 positions"):
        generate(optimus, torch.zeros(1, 6), GenerationConfig(max_new_tokens=3), prompts="the sun " * 200)
    with pytest.raises(DataError, match="as many rows"):
        generate(model, torch.zeros(2, 6), prompts=["one"])


def test_stop_tokens_end_a_sentence():
    model = make_model("gpt2").eval()
    z = 2 * torch.randn(12, 6)
    free = list(generate(model, z))
    stop = free[0].ids[3]
    for out, before in zip(generate(model, z, GenerationConfig(stop_tokens=(stop,))), free, strict=True):
        assert out.ids == (before.ids[: before.ids.index(stop)] if stop in before.ids else before.ids)
        assert out.finished == (stop in before.ids)
    with pytest.raises(ConfigError, match="vocabulary"):
        generate(model, z, GenerationConfig(stop_tokens=(10**6,)))


def test_repetition_penalty_forbids_what_was_said():
    model = make_model("gpt2").eval()
    z = 2 * torch.randn(8, 6)
    assert any(len(set(out.ids)) < len(out.ids) for out in generate(model, z)), (
        "nothing repeats: it would prove nothing"
    )
    strict = GenerationConfig(repetition_penalty=1e30, batch_size=3)
    # a penalty beyond all bounds leaves a said token only where no other has a positive score
    for out in generate(model, z, strict):
        assert len(set(out.ids)) == len(out.ids)


def test_the_tokens_of_a_prompt_count_as_said():
    model = make_model("gpt2").eval()
    z, config = torch.randn(2, 6), GenerationConfig(repetition_penalty=1.2)
    with torch.no_grad():
        rows = Rows(model, model.inject(z[:0]), 3, limit=4, longest_prompt=3, config=config, seed=None)
        rows.start([2, 0], model.inject(z), [Start(0, 0, 0, (7, 9, 7)), Start(1, 0, 1)])
        assert [row.nonzero().flatten().tolist() for row in rows.state["seen"]] == [[], [], [7, 9]]
        rows.start([2], model.inject(z[1:]), [Start(2, 0, 2, (5,))])  # nothing of the sentence before is left
        assert rows.state["seen"][2].nonzero().flatten().tolist() == [5]
        rows.advance()
    first = rows.state["ids"][:, 0].tolist()
    assert [row.nonzero().flatten().tolist() for row in rows.state["seen"]][::2] == [[first[0]], sorted({5, first[2]})]


def test_log_probabilities_are_the_models():
    model = make_model("llama").eval()
    z = 2 * torch.randn(5, 6)
    end_with_a_common_token(model, z)
    for options in ({}, {"do_sample": True, "seed": 2, "temperature": 0.6, "top_k": 5}):
        for out in generate(model, z, GenerationConfig(logprobs=True, batch_size=2, **options)):
            assert out.logprobs is not None and len(out.logprobs) == len(out.ids)
            ids = torch.tensor([[model.decoder.tokenizer.bos_token_id, *out.ids]])[:, : len(out.ids)]
            if not out.ids:
                continue
            with torch.no_grad():
                hidden = model.decoder.hidden(
                    ids[0], model.inject(z[out.index : out.index + 1]), max_seqlen=len(out.ids),
                    cu_seqlens=torch.tensor([0, len(out.ids)], dtype=torch.int32),
                    rows=torch.zeros(len(out.ids), dtype=torch.int64), token_index=torch.arange(len(out.ids)),
                )  # fmt: skip
                expected = model.decoder.logits(hidden).log_softmax(-1)
            expected = expected.gather(-1, torch.tensor(out.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(out.logprobs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"visibility": "prefix", "slots": 2}, {"visibility": "interleaved"}], ids=str)
def test_samples_of_one_prompt_read_it_once(monkeypatch, options):
    """As they would, each by itself, behind prompts of different lengths, refilled rows included."""
    from lmvae_fast.generation import decode_rows

    model = make_model("llama", max_len=12, **options).eval()
    z, prompts, read = torch.randn(3, 6), ["the sun is", "a", "plants need light"], []
    plain = decode_rows.read

    def counting(decoder, cache, injection, rows, ids):
        read.append(len(rows))
        plain(decoder, cache, injection, rows, ids)

    monkeypatch.setattr(decode_rows, "read", counting)
    config = GenerationConfig(do_sample=True, seed=3, num_samples=4, batch_size=6, max_new_tokens=3)
    found = [(out.index, out.sample, out.ids) for out in generate(model, z, config, prompts=prompts)]
    assert sum(read) < 12 and max(read) <= 3
    each = [prompt for prompt in prompts for _ in range(4)]
    alone = generate(model, z.repeat_interleave(4, 0), config.replace(num_samples=1), prompts=each)
    assert [ids for _, _, ids in found] == [out.ids for out in alone]
