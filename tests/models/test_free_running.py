"""Free running by fixed-point iteration says what the loop over tokens says, in as few passes as the guess is right."""

import dataclasses

import pytest
import torch

from lmvae_fast.models.decoder import recorded_step
from lmvae_fast.models.free_running import FreeRunning, greedy_ids
from lmvae_fast.testing import make_model
from tests.generation.replay import RecordedOperations

SENTENCES = ["the cat sat on the mat", "a dog", "plants need light", "ice"]


def parts(family="gpt2", **config):
    model = make_model(family, max_len=9, projector_dropout=0.0, free_running=True, **config).eval()
    with torch.no_grad():  # memories that differ enough for sentences to be read differently
        model.projector.weight.mul_(4.0)
    batch = model.make_batch(model.tokenize(SENTENCES))
    injection = model.inject(torch.randn(4, 6), tokens=batch.max_seqlen).detach()
    ids = greedy_ids(model.decoder, injection, batch.max_seqlen - 1)
    start = ids.new_full((4, 1), model.decoder.tokenizer.bos_token_id)
    want = torch.cat([start, ids], 1)[batch.rows, batch.token_index]
    return model, batch, injection, want


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("system", [{}, {"visibility": "prefix", "slots": 2}, {"system": "optimus"}])
def test_the_second_loop_of_a_shape_is_recorded(system, autocast, monkeypatch):
    made = []

    class Recording(RecordedOperations):
        def __init__(self, step, device):
            super().__init__(step, device)
            made.append(self)

    model = make_model("gpt2", max_len=9, **system).eval()
    injections = [model.inject(2 * torch.randn(4, 6)).detach() for _ in range(4)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = [greedy_ids(model.decoder, injection, 7) for injection in injections]
        monkeypatch.setitem(recorded_step.CAPTURES, "cpu", Recording)
        for i, injection in enumerate(injections):
            assert torch.equal(greedy_ids(model.decoder, injection, 7), expected[i])
            # the first as it is; then two plain steps and the one that is recorded; from there one replay a token
            assert sum(recording.replays for recording in made) == (0, 5, 12, 19)[i]
        assert len(made) == 1
        assert torch.equal(greedy_ids(model.decoder, injections[0], 6), expected[0][:, :6])  # another shape
    assert len(made) == 1
    greedy_ids(model.decoder.train(), injections[0], 7)  # and another mode
    assert len(made) == 1


@pytest.mark.parametrize("visibility", ["prefix", "rolling", "interleaved"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_any_guess_ends_in_what_the_loop_says(family, visibility):
    model, batch, injection, want = parts(family, visibility=visibility)
    for seed in range(5):
        torch.manual_seed(seed)
        guess = torch.where(batch.token_index > 0, torch.randint_like(want, model.decoder.vocab_size), batch.input_ids)
        free = FreeRunning()
        assert torch.equal(free.inputs(model.decoder, dataclasses.replace(batch, input_ids=guess), injection), want)


@pytest.mark.parametrize(
    "system", [{}, {"visibility": "prefix", "slots": 2}, {"visibility": "rolling"}, {"system": "optimus"}]
)
@pytest.mark.parametrize("wanted", [[7, 2, 0, 5], [1, 1, 1, 1], [7, 7, 7, 7], [0, 0, 0, 0], [3, 9, 3, 1]])
def test_rows_leave_the_loop_when_they_have_their_tokens(system, wanted, monkeypatch):
    model = make_model("gpt2", max_len=9, **system).eval()
    injection = model.inject(2 * torch.randn(4, 6)).detach()
    whole, lengths, rows = greedy_ids(model.decoder, injection, 7), torch.tensor(wanted), []
    step = model.decoder.greedy_step
    monkeypatch.setattr(
        type(model.decoder),
        "greedy_step",
        lambda self, ids, *rest, **named: rows.append(len(ids)) or step(ids, *rest, **named),
    )
    ids = greedy_ids(model.decoder, injection, 7, lengths)
    for row, count in enumerate(wanted):
        assert torch.equal(ids[row, :count], whole[row, :count])
    assert sum(rows) == lengths.clamp(max=7).sum()  # no row is read for nothing


@pytest.mark.parametrize("system", [{}, {"visibility": "prefix", "slots": 2, "embedding_shift": True}])
def test_autocast_is_left_where_all_weights_are_of_its_dtype(system, monkeypatch):
    """So that a bf16 run reads its own output through the weights packed for decoding, as generation does."""
    model = make_model("gpt2", max_len=9, **system).eval()
    model.decoder.model.bfloat16()
    injection = model.inject(2 * torch.randn(4, 6)).detach()
    within, run = [], type(model.decoder).greedy_step
    monkeypatch.setattr(
        type(model.decoder),
        "greedy_step",
        lambda *args, **named: within.append(torch.is_autocast_enabled("cpu")) or run(*args, **named),
    )
    expected = greedy_ids(model.decoder, injection, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(greedy_ids(model.decoder, injection, 7), expected)
        assert torch.is_autocast_enabled("cpu")
        assert not any(within)
        model.decoder.body.ln_f.float()
        greedy_ids(model.decoder, injection, 7)
    assert all(within[-7:])  # weights of two dtypes need it


def test_a_right_guess_takes_one_pass_and_a_wrong_token_costs_its_sentence_another():
    model, batch, injection, want = parts()
    free = FreeRunning()
    right = dataclasses.replace(batch, input_ids=want)
    assert torch.equal(free.inputs(model.decoder, right, injection), want)
    assert (free.passes, free.looped) == (1, 0)
    guess = want.clone()
    last = int(batch.cu_seqlens[1]) - 1  # of the first sentence: nothing follows it
    guess[last] = (guess[last] + 1) % model.decoder.vocab_size
    assert torch.equal(free.inputs(model.decoder, dataclasses.replace(batch, input_ids=guess), injection), want)
    assert (free.passes, free.looped) == (2, 0)


def test_after_a_pass_that_fixes_few_sentences_the_loop_is_left_alone_for_a_while():
    model, batch, injection, want = parts()
    guess = torch.where(batch.token_index > 0, (want + 1) % model.decoder.vocab_size, want)
    wrong = dataclasses.replace(batch, input_ids=guess)
    free = FreeRunning()
    taken = []
    for _ in range(18):
        assert torch.equal(free.inputs(model.decoder, wrong, injection), want)
        taken.append(free.passes)
    assert taken[0] >= 1
    assert taken[1:17] == [0] * 16
    assert taken[17] >= 1
