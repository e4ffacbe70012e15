"""Recorded decode steps, with a stand-in for CUDA graphs: what is recorded, replayed, thrown away, and refused."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError
from lmvae_fast.generation import cuda_graphs as graphs
from lmvae_fast.generation import engine
from lmvae_fast.generation.cuda_graphs import PLAIN_STEPS, RecordedStep, rows_of
from lmvae_fast.generation.engine import generate
from lmvae_fast.models.decoder import recorded_step
from lmvae_fast.testing import FAMILIES, make_model
from tests.generation.replay import RecordedOperations
from tests.generation.test_engine import end_with_a_common_token

OPTIONS = (
    {},
    {"do_sample": True, "seed": 3, "temperature": 0.7, "top_p": 0.9, "num_samples": 2},
    {"do_sample": True, "seed": 3, "repetition_penalty": 1.3, "logprobs": True},
)


@pytest.fixture
def recordings(monkeypatch):
    """Recordings made by the CPU's stand-in, with the number of rows of each."""
    made = []

    class Recording(RecordedOperations):
        def __init__(self, step, device):
            super().__init__(step, device)
            made.append((step.__self__.size, self))

    monkeypatch.setitem(recorded_step.CAPTURES, "cpu", Recording)
    monkeypatch.setattr(graphs, "LEAST_ROWS", 2)
    return made


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("system", [
    {}, {"visibility": "interleaved", "family": "llama"}, {"system": "optimus"},
    {"visibility": "prefix", "slots": 3, "family": "gemma2"},
])  # fmt: skip
def test_replayed_steps_give_the_same_texts(recordings, system, options):
    """Over refills, with prompts, and in the smaller batches at the end."""
    model = make_model(**{"family": "gpt2", "max_len": 24, **system}).eval()
    z = 2 * torch.randn(27, 6)
    end_with_a_common_token(model, z)
    recordings.clear()
    prompts = ["the sun" if row % 3 else "" for row in range(27)]
    config = GenerationConfig(batch_size=11, max_new_tokens=20, pack_weights=False, **options)
    expected = list(generate(model, z, config.replace(cuda_graphs=False), prompts=prompts))
    assert not recordings
    got = list(generate(model, z, config, prompts=prompts))
    assert [replace(out, logprobs=None) for out in got] == [replace(out, logprobs=None) for out in expected]
    for out, plain in zip(got, expected, strict=True):
        if plain.logprobs is not None:  # in batches of another size: not the same bits
            torch.testing.assert_close(torch.tensor(out.logprobs), torch.tensor(plain.logprobs), rtol=1e-4, atol=1e-4)
    sizes = [size for size, _ in recordings]
    assert sizes[0] == 11 and set(sizes[1:]) <= {2, 4, 8} and len(sizes) > 1
    assert sizes == sorted(set(sizes), reverse=True), "a size is recorded once"
    assert sum(recording.replays for _, recording in recordings) > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_can_be_recorded(recordings, family):
    model = make_model(family, visibility="prefix", slots=2).eval()
    z = 2 * torch.randn(3, 6)
    model.decoder.tokenizer.eos_token_id = -1
    config = GenerationConfig(pack_weights=False)
    assert list(generate(model, z, config)) == list(generate(model, z, config.replace(cuda_graphs=False)))
    assert [size for size, _ in recordings] == [3]


def run_again(model, z, config, **changes):
    """Texts of two calls, recorded, each checked against plain steps."""
    for seed in (3, 4):
        asked = config.replace(seed=seed, **changes)
        assert list(generate(model, z, asked)) == list(generate(model, z, asked.replace(cuda_graphs=False)))


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_p": 0.9}])
def test_a_recording_serves_later_calls(recordings, options):
    model = make_model("gpt2", max_len=12).eval()
    z, config = 2 * torch.randn(3, 6), GenerationConfig(pack_weights=False, **options)
    model.decoder.tokenizer.eos_token_id = -1
    run_again(model, z, config)
    assert [size for size, _ in recordings] == [3] and recordings[0][1].replays > 12
    with torch.no_grad():  # weights that change in place are read as they are
        for weight in model.decoder.parameters():
            weight.mul_(1.1)
    run_again(model, z, config)
    assert len(recordings) == 1
    run_again(model, z, config, max_new_tokens=9)  # another kind of call
    assert len(recordings) == 2
    weight = next(model.decoder.parameters())
    weight.data = weight.data.flip(0)  # other storage: the recording would read the old one
    run_again(model, z, config)
    assert len(recordings) == 3


def test_two_calls_at_once_do_not_share_rows(recordings):
    model = make_model("gpt2", max_len=12).eval()
    z, config = 2 * torch.randn(2, 3, 6), GenerationConfig(pack_weights=False, batch_size=3)
    expected = [list(generate(model, x, config.replace(cuda_graphs=False))) for x in z]
    for _ in range(2):  # the second time there are kept rows to quarrel about
        assert [list(pair) for pair in zip(*(generate(model, x, config) for x in z), strict=True)] == [
            list(pair) for pair in zip(*expected, strict=True)
        ]
    abandoned = generate(model, z[0], config)
    next(abandoned)
    del abandoned
    assert list(generate(model, z[1], config)) == expected[1]


def test_kept_rows_do_not_keep_a_decoder_alive(recordings, monkeypatch):
    monkeypatch.setattr(graphs, "_kept", weakref.WeakKeyDictionary())
    model = make_model("gpt2", max_len=8).eval()
    model.decoder.tokenizer.eos_token_id = -1
    for tokens in range(3, 3 + graphs.MOST_KEPT + 2):
        list(generate(model, torch.randn(2, 6), GenerationConfig(pack_weights=False, max_new_tokens=tokens)))
    assert len(graphs._kept[model.decoder]) == graphs.MOST_KEPT
    recordings.clear()
    gone = weakref.ref(model.decoder)
    del model
    gc.collect()
    assert gone() is None and not graphs._kept


def test_looking_seldom_changes_nothing(recordings, monkeypatch):
    model = make_model("gpt2", max_len=24).eval()
    z = 2 * torch.randn(27, 6)
    end_with_a_common_token(model, z)
    recordings.clear()
    expected = list(generate(model, z, GenerationConfig(batch_size=11, cuda_graphs=False)))
    monkeypatch.setitem(engine.STEPS_PER_LOOK, "cpu", 8)
    assert list(generate(model, z, GenerationConfig(batch_size=11))) == expected
    assert recordings[0][1].replays > PLAIN_STEPS


def test_a_decoder_that_looks_at_a_value_is_run_as_it_is(recordings, caplog):
    model = make_model("gpt2").eval()
    z = 2 * torch.randn(6, 6)
    config = GenerationConfig(batch_size=4, pack_weights=False)
    expected = list(generate(model, z, config.replace(cuda_graphs=False)))
    forward = model.decoder.body.forward
    model.decoder.body.forward = lambda **inputs: (
        forward(**inputs) if float(inputs["inputs_embeds"].sum()) > -1e9 else None
    )
    assert list(generate(model, z, config)) == expected
    assert list(generate(model, z, config)) == expected
    said = [record.message for record in caplog.records if "kernel by kernel" in record.message]
    assert len(said) == 1 and "_local_scalar_dense" in said[0]  # once for a decoder, not once a batch
    assert not recordings


class Counter:
    """A step that counts, and what has been asked of it."""

    def __init__(self):
        self.state = torch.zeros(3, dtype=torch.int64)
        self.runs = 0

    def step(self):
        self.runs += 1
        self.state.add_(1)


def test_a_step_is_run_then_recorded_then_replayed():
    counter, decoder = Counter(), torch.nn.Linear(1, 1)
    recorded = RecordedStep(counter.step, [counter.state], RecordedOperations, decoder)
    for calls in range(1, 9):
        recorded()
        assert counter.state.tolist() == [calls] * 3
        # once for the comparison and once while it is recorded; never again
        assert counter.runs == (calls if calls <= PLAIN_STEPS else PLAIN_STEPS + 2)


def test_a_recording_that_gives_something_else_is_not_used(caplog):
    counter, decoder = Counter(), torch.nn.Linear(1, 1)

    class Wrong:
        def __init__(self, step, device):
            self.state = counter.state

        def replay(self):
            self.state.add_(2)

    recorded = RecordedStep(counter.step, [counter.state], Wrong, decoder)
    for calls in range(1, 9):
        recorded()
        assert counter.state.tolist() == [calls] * 3
    assert "other tokens" in caplog.text
    assert graphs.capture_for(decoder, torch.device("cuda"), None) is None


def test_batches_shrink_to_powers_of_two():
    assert [rows_of(n) for n in (1, 8, 9, 16, 17, 1000)] == [8, 8, 16, 16, 32, 1024]


def test_what_is_recorded_where(monkeypatch):
    decoder = torch.nn.Linear(1, 1)
    assert graphs.capture_for(decoder, torch.device("cpu"), None) is None
    assert graphs.capture_for(decoder, torch.device("cuda"), None) is recorded_step.CudaGraph
    assert graphs.capture_for(decoder, torch.device("cuda"), False) is None
    with lf.backend("reference"):
        assert graphs.capture_for(decoder, torch.device("cuda"), None) is None
        assert graphs.capture_for(decoder, torch.device("cuda"), True) is recorded_step.CudaGraph
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    assert graphs.capture_for(decoder, torch.device("cuda"), True) is None
    with pytest.raises(ConfigError, match="cuda_graphs"):
        generate(make_model("gpt2"), torch.zeros(1, 6), GenerationConfig(cuda_graphs=True))
