"""Steps recorded as one graph do what the loop does kernel by kernel, and leave the host next to nothing."""

from __future__ import annotations

import logging
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import lmvae_fast as lf
from lmvae_fast.models.decoder import recorded_step
from lmvae_fast.testing import make_model
from lmvae_fast.text.batch import filled
from lmvae_fast.training.loop import Trainer
from lmvae_fast.training.recorded_steps import moved, size_of
from tests.generation.replay import RecordedOperations

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dogs", "ran", "over", "green", "hills", "under", "rain"]
TEXTS = [" ".join(WORDS[(i * 5 + j) % len(WORDS)] for j in range(1 + i % 7)) for i in range(40)]


class Recording(RecordedOperations):
    """A CPU recording whose replays no dispatch mode sees, as a graph's launch is one for the host."""

    made: ClassVar[list[Recording]] = []

    def __init__(self, step, device):
        super().__init__(step, device)
        self.made.append(self)

    def replay(self):
        with _disable_current_modes():
            super().replay()


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setattr(Recording, "made", [])
    monkeypatch.setitem(recorded_step.CAPTURES, "cpu", Recording)
    return Recording.made


def trained(folder, *, steps=12, model=None, **options):
    torch.manual_seed(0)
    model = model or make_model("gpt2", max_len=9, projector_dropout=0.0)
    settings = {
        "max_steps": steps, "batch_size": 8, "learning_rate": 3e-3, "tensorboard": False, "progress": False, "log_every": 1,
        "schedule": "linear", "beta_schedule": "linear", "beta_zero": 0.3, "beta_increase": 0.3, "weight_decay": 0.01,
    } | options  # fmt: skip
    result = lf.train(model, TEXTS, None, lf.TrainConfig(output_dir=str(folder), **settings))
    return model, result


def figures(result):
    names = ("loss", "reconstruction", "kl", "grad_norm", "beta", "learning_rate")
    return torch.tensor([[row[name] for name in names] for row in result.history if row["kind"] == "train"])


@pytest.mark.parametrize(
    "system",
    [
        {},
        {"visibility": "prefix", "slots": 2},
        {"system": "optimus", "train_encoder": False},
        {"system": "llamavae", "decoder_part": "all"},
        {"kl_mode": "free_bits", "kl_target": 0.1},
        {"length_normalize": True},
        {"objective": "langvae-0.6"},
    ],
    ids=str,
)
def test_recorded_steps_train_as_plain_ones(system, recording, tmp_path):
    def model():
        torch.manual_seed(1)
        model = make_model("gpt2", max_len=9, projector_dropout=0.0, **system)
        for module in model.modules():  # whose draws would be those of a filled batch
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    _, expected = trained(tmp_path / "plain", model=model(), cuda_graphs=False)
    assert not recording
    _, result = trained(tmp_path / "recorded", model=model())
    assert sum(made.replays for made in recording) >= 4
    torch.testing.assert_close(figures(result), figures(expected), rtol=2e-4, atol=1e-5)
    assert result.tokens == expected.tokens
    assert result.sentences == expected.sentences


def test_a_decoder_with_dropout_draws_anew_in_every_replay(recording, tmp_path):
    model = make_model("gpt2", max_len=9, system="llamavae", decoder_part="all")
    assert any(module.p > 0 for module in model.decoder.modules() if isinstance(module, torch.nn.Dropout))
    _, result = trained(tmp_path, model=model, learning_rate=1e-12, beta_schedule="constant", bucket_batches=1)
    assert sum(made.replays for made in recording) >= 2
    assert len(set(figures(result)[:, 0].tolist())) == len(figures(result))


def test_one_replay_a_step_and_nothing_else_than_copies_and_fills(recording, tmp_path):
    class Counted(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            touched = [x for x in args if isinstance(x, torch.Tensor)]
            if any(x.data_ptr() in self.static for x in touched[:1]):
                self.found.append(func)
            return func(*args, **(kwargs or {}))

    model = make_model("gpt2", max_len=9, projector_dropout=0.0)
    config = lf.TrainConfig(output_dir=str(tmp_path), batch_size=8, progress=False, tensorboard=False, max_steps=9)
    trainer = Trainer(model, TEXTS, None, config, ())
    trainer.check_every_step = False  # as on a GPU
    (rows,) = trainer._batches(0)
    with trainer.prepared():
        for _ in range(2):
            trainer.optimizer_step((rows,))
        assert [made.replays for made in recording] == [1]  # that by which it was checked
        (found,) = trainer.recorded._recordings.values()
        statics = [found.inputs._whole, found.inputs._pooled, found.inputs.beta, *trainer.state.optimizer._rates]
        everything, _ = moved(trainer.state, trainer.watch)
        counted = Counted()
        counted.static = {x.data_ptr() for x in (*statics, *everything)}
        with counted:
            trainer.optimizer_step((rows,))
        assert [made.replays for made in recording] == [2]
    names = sorted(str(func) for func in counted.found)
    assert names == ["aten.copy_.default"] * 2 + ["aten.fill_.Scalar"] * 3


def test_a_replay_counts_as_a_change_of_what_trains(recording, tmp_path, monkeypatch):
    """By a tensor's version others see that what they made from it is old; kernels that are replayed do not count."""
    model = make_model("gpt2", max_len=9, projector_dropout=0.0)
    config = lf.TrainConfig(output_dir=str(tmp_path), batch_size=8, progress=False, tensorboard=False, max_steps=9)
    trainer = Trainer(model, TEXTS, None, config, ())
    trainer.check_every_step = False
    (rows,) = trainer._batches(0)
    with trainer.prepared():
        for _ in range(2):
            trainer.optimizer_step((rows,))
        (found,) = trainer.recorded._recordings.values()
        monkeypatch.setattr(found.graph, "replay", lambda: None)
        before = [parameter._version for parameter in trainer.parameters.values()]
        trainer.optimizer_step((rows,))
        after = [parameter._version for parameter in trainer.parameters.values()]
    assert all(now > then for now, then in zip(after, before, strict=True))


def test_recordings_end_with_the_state_they_were_made_in(recording, tmp_path):
    """In bf16 the frozen weights have copies for as long as a run is prepared, elsewhere the next time."""
    model = make_model("gpt2", max_len=9, projector_dropout=0.0)
    config = lf.TrainConfig(
        output_dir=str(tmp_path), batch_size=8, progress=False, tensorboard=False, max_steps=9, precision="bf16"
    )
    trainer = Trainer(model, TEXTS, None, config, ())
    (rows,) = trainer._batches(0)
    for times in (1, 2):
        with trainer.prepared():
            for _ in range(3):
                trainer.optimizer_step((rows,))
            assert trainer.recorded.recordings == 1
        assert trainer.recorded.recordings == 0
        assert len(recording) == times


def test_resumed_recorded_run_ends_as_the_unbroken_one(recording, tmp_path):
    constant = {"schedule": "constant", "beta_schedule": "constant", "save_every": 5}
    whole, _ = trained(tmp_path / "whole", steps=10, **constant)
    trained(tmp_path / "broken", steps=5, **constant)
    with pytest.warns(UserWarning, match="max_steps"):
        resumed, _ = trained(tmp_path / "broken", steps=10, resume=True, **constant)
    assert recording
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_step_that_waits_for_the_device_is_run_as_it_is(recording, tmp_path, monkeypatch, caplog):
    _, expected = trained(tmp_path / "plain", cuda_graphs=False)
    step = Trainer._step_over

    def reading(self, inputs, beta):
        step(self, inputs, beta)
        float(inputs.beta)

    monkeypatch.setattr(Trainer, "_step_over", reading)
    with caplog.at_level(logging.WARNING):
        _, result = trained(tmp_path / "mine")
    assert caplog.text.count("kernel by kernel") == 1
    torch.testing.assert_close(figures(result), figures(expected), rtol=2e-4, atol=1e-5)


def test_a_replay_that_goes_elsewhere_is_not_used(recording, tmp_path, monkeypatch, caplog):
    _, expected = trained(tmp_path / "plain", cuda_graphs=False)

    def wrong(self):
        for func, args, kwargs, _ in self.calls[: len(self.calls) // 2]:
            func(*args, **kwargs)

    monkeypatch.setattr(Recording, "replay", wrong)
    with caplog.at_level(logging.WARNING):
        _, result = trained(tmp_path / "mine")
    assert "a replay moved the state" in caplog.text
    torch.testing.assert_close(figures(result), figures(expected), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"accumulation": 2}, "accumulation=2"),
        ({"precision": "fp16"}, "fp16"),
        ({"recompute_decoder": True}, "recompute_decoder"),
    ],
)
def test_what_cannot_be_recorded_is_refused_where_it_is_asked_for(options, reason, recording, tmp_path):
    with pytest.raises(lf.ConfigError, match=reason):
        trained(tmp_path / "asked", cuda_graphs=True, **options)
    if options.get("precision") != "fp16":  # which the CPU has no scaler for
        trained(tmp_path / "not", steps=2, **options)
    assert not recording


def test_what_of_a_model_is_a_reason_too(recording, tmp_path, monkeypatch):
    with pytest.raises(lf.ConfigError, match="free_running"):
        trained(tmp_path / "a", cuda_graphs=True, model=make_model("gpt2", max_len=9, free_running=True))
    with pytest.raises(lf.ConfigError, match="encoder reads"):
        trained(tmp_path / "c", cuda_graphs=True, model=make_model("gpt2", max_len=9, system="optimus"))
    monkeypatch.delitem(recorded_step.CAPTURES, "cpu")
    with pytest.raises(lf.ConfigError, match="the model is on cpu"):
        trained(tmp_path / "b", cuda_graphs=True)


@pytest.mark.parametrize("sentences", [1, 8, 32, 256])
def test_every_number_of_tokens_fits_its_size(sentences):
    torch.manual_seed(0)
    model = make_model("gpt2", max_len=33)
    for _ in range(200):
        longest = int(torch.randint(1, 34, ()))
        lengths = torch.randint(1, longest + 1, (sentences,))
        lengths[0] = longest
        tokens = int(lengths.sum())
        size = size_of(sentences, tokens, longest, 33)
        missing = size.tokens - tokens
        assert size.fillers <= missing <= size.fillers * size.longest
        assert longest <= size.longest <= 33
        assert size.tokens <= max(tokens * 1.125 + 64 + size.fillers, tokens + 130)
    batch = model.make_batch(model.tokenize(["a cat", "the dog ran"]))
    with pytest.raises(ValueError, match="cannot have"):
        filled(batch, batch.num_tokens + 50, 2, 9)
