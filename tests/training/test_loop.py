"""The training loop: what it computes, how it ends, and what it refuses."""

import os
import signal
import threading

import pytest
import torch

from lmvae_fast.config import TrainConfig
from lmvae_fast.errors import CheckpointError, ConfigError, DataError, MemoryLimitError, NumericalError, OutputError
from lmvae_fast.training import Callback, train
from lmvae_fast.training.callbacks import read_records
from lmvae_fast.training.checkpoints import folder as checkpoint
from lmvae_fast.training.loop import Trainer
from lmvae_fast.training.schedule import beta_at, learning_rate_factor
from lmvae_fast.training.validation import validate
from tests.training.fake_model import FakeModel, sentences
from tests.training.helpers import StopAt, assert_same_checkpoint, run, settings


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_equals_a_plain_loop(tmp_path):
    """The same steps written out: AdamW, clipping, warm-up and cosine, beta, one seed a step."""
    model, config = FakeModel(), settings(tmp_path, weight_decay=0.1, grad_clip=0.7)
    batches = []
    make_batch = model.make_batch
    model.make_batch = lambda *args: batches.append(make_batch(*args)) or batches[-1]
    train(model, sentences(60), None, config)

    other = FakeModel()
    parameters = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1, fused=True)
    torch.manual_seed(config.seed)
    assert len(batches) == 24
    for step, batch in enumerate(batches):
        factor = learning_rate_factor(step, 24, schedule="cosine", warmup=3)
        optimizer.param_groups[0]["lr"] = 0.05 * factor
        out = other(batch, beta=beta_at(step, 24, config), seed=int(torch.randint(2**62, ())))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.7)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in weights(other).items():
        assert torch.equal(value, weights(model)[name]), name
    seen = torch.cat([batch.indices for batch in batches[8:16]])
    assert sorted(seen.tolist()) == list(range(60)), "an epoch is every sentence once"


def test_it_learns(tmp_path):
    result = run(tmp_path, epochs=20, beta_schedule="constant", schedule="constant")
    losses = [record["loss"] for record in result.history if record["kind"] == "train"]
    assert losses[-1] < 0.85 * losses[0]
    assert result.stop_reason == "completed"
    assert not result.interrupted
    assert (result.step, result.epoch, result.sentences) == (160, 20.0, 1200)
    assert result.tokens_per_second > 0


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (8, 2), (1, 8)])
def test_accumulation_equals_the_big_batch(tmp_path, batch_size, accumulation):
    """k micro-batches of b are one batch of k * b, also where they are unequal: 60 sentences are 3 * 16 + 8 + 4."""
    models = []
    for i, (size, parts) in enumerate([(batch_size * accumulation, 1), (batch_size, accumulation)]):
        # float64 shows that the sums are the same but for rounding; noise is drawn per micro-batch, so it is off
        model = FakeModel(noise=False, dropout=0.0).double()
        run(tmp_path / str(i), model=model, evaluated=False, batch_size=size, accumulation=parts)
        models.append(weights(model))
    one, many = models
    moved = max((one[name] - value.detach().double()).abs().max() for name, value in FakeModel().named_parameters())
    assert moved > 0.01
    for name, value in one.items():
        torch.testing.assert_close(value, many[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_float32_weights_and_learns(tmp_path, precision):
    seen = []
    model = FakeModel()
    model.output.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    result = run(tmp_path, model=model, precision=precision, epochs=10, beta_schedule="constant")
    assert set(seen) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert all(value.dtype == torch.float32 for value in model.parameters())
    full = run(tmp_path / "full", epochs=10, beta_schedule="constant")
    assert result.history[-1]["loss"] == pytest.approx(full.history[-1]["loss"], rel=0.03)


def test_fp16_skips_steps_while_it_finds_its_scale(tmp_path):
    """An infinite scaled gradient is the scaler's business and no reason to stop."""
    model = FakeModel(train_encoder=True)
    trainer = Trainer(model, sentences(60), None, settings(tmp_path, precision="fp16"), ())
    trainer.state.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    result = trainer.run()
    assert result.stop_reason == "completed"
    assert trainer.state.optimizer.scaler.get_scale() < 2.0**60
    assert all(torch.isfinite(value).all() for value in model.parameters())


def test_history_is_exact_means(tmp_path):
    """A record's figures are those of its sentences, not means of means of unequal batches."""
    model = FakeModel(noise=False, dropout=0.0)
    result = run(tmp_path, model=model, epochs=1, log_every=8, learning_rate=1e-12, beta_schedule="constant")
    train_record, eval_record = result.history
    tokenized = model.tokenize(sentences(60))
    figures = validate(model, tokenized, model.pool(tokenized), batch_size=7, beta=1.0)
    for name in ("loss", "reconstruction", "kl", "elbo"):
        assert train_record[name] == pytest.approx(figures[name], rel=1e-5)
    assert (train_record["kind"], eval_record["kind"]) == ("train", "eval")
    assert eval_record["improved"]
    assert result.best == eval_record
    assert read_records(tmp_path / "metrics.jsonl") == result.history


def test_validate_against_its_definition():
    model = FakeModel(dropout=0.5).train()
    tokenized = model.tokenize(sentences(33))

    def draw(*_):  # as a module with dropout would, say; changes nothing else
        torch.rand(1)

    model.posterior_head.register_forward_hook(draw)
    state = torch.get_rng_state()
    figures = validate(model, tokenized, model.pool(tokenized), batch_size=33, beta=0.5, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    model.eval()
    order = sorted(range(33), key=lambda row: -len(tokenized.ids[row]))
    out = model(model.make_batch(tokenized, order, model.pool(tokenized)), beta=0.5, seed=(3 << 32))
    assert figures["reconstruction"] == pytest.approx(out.reconstruction.mean().item())
    assert figures["kl"] == pytest.approx(out.kl.mean().item())
    assert figures["loss"] == pytest.approx((out.reconstruction + 0.5 * out.kl).mean().item())
    assert figures["elbo"] == pytest.approx(-(out.reconstruction + out.kl).mean().item())
    assert figures["reconstruction_per_token"] == pytest.approx((out.reconstruction.sum() / out.tokens.sum()).item())
    assert figures["active_units"] == (out.mu.var(0) >= 0.01).sum()
    split = validate(model, tokenized, None, batch_size=5, beta=0.5, seed=3)
    assert split["active_units"] == figures["active_units"]
    with torch.no_grad():
        model.posterior_head.weight[:2].zero_()
    assert validate(model, tokenized, None, batch_size=5, beta=0.5)["active_units"] == 2


# -- how a run ends --------------------------------------------------------------------------------------------------


class Poisoned(FakeModel):
    """Gives a NaN loss (or only a NaN gradient) on a batch with row 41 once `after` batches have been made."""

    def __init__(self, after=0, gradient_only=False):
        super().__init__()
        self.after, self.gradient_only, self.calls = after, gradient_only, 0

    def forward(self, batch, **options):
        out = super().forward(batch, **options)
        self.calls += self.training
        if self.training and self.calls > self.after and 41 in batch.indices:
            # sqrt'(0) is infinite and 0 * inf is NaN in backward, while the value is 0
            bad = (
                (self.output.weight.sum() * 0).sqrt() if self.gradient_only else self.output.weight.sum() * float("nan")
            )
            out.loss = out.loss + bad
        return out


@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("check_every_step", [True, False])
def test_not_a_number_stops_the_run(tmp_path, gradient_only, accumulation, check_every_step):
    """Names step, rows and the last good checkpoint, in both ways of looking: at once (CPU) and where figures are read
    (as on a GPU)."""
    model = Poisoned(after=8 * accumulation, gradient_only=gradient_only)
    config = settings(tmp_path, batch_size=8 // accumulation, accumulation=accumulation, save_every=8, log_every=24)
    trainer = Trainer(model, sentences(60), None, config, ())
    trainer.check_every_step = check_every_step
    with pytest.raises(NumericalError, match="gradient norm" if gradient_only else "loss") as caught:
        trainer.run()
    error = caught.value
    assert 41 in error.rows
    assert len(error.rows) <= (8 if gradient_only else 8 // accumulation)
    assert 9 <= error.step < 16, "in the second epoch, some steps before its figures are read at step 16"
    assert f"step {error.step} is NaN" in str(error)
    assert str(error.rows) in str(error)
    assert str(error.checkpoint) in str(error)
    plan = trainer._batches(error.step - 1)
    assert set(error.rows) <= {int(row) for rows in plan for row in rows}
    # Only good checkpoints were written, and the one named is the newest of them.
    newest = checkpoint.complete(tmp_path / "checkpoints")[0]
    assert error.checkpoint == newest
    assert int(newest.name[-8:]) < error.step
    assert all(torch.isfinite(value).all() for value in checkpoint.load(newest).tensors["model"].values())
    if check_every_step:
        assert all(torch.isfinite(value).all() for value in model.parameters()), "the bad step was not taken"


class Greedy(FakeModel):
    """Asks for more memory than there is, at its third step."""

    def __init__(self, error=None):
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, batch, **options):
        self.calls += self.training
        if self.calls > 2:
            if self.error is not None:
                raise self.error
            torch.empty(2**60, dtype=torch.uint8)
        return super().forward(batch, **options)


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), MemoryError()])
def test_out_of_memory_says_what_took_it(tmp_path, error):
    with pytest.raises(MemoryLimitError, match=r"forward and backward of 8 sentences with [0-9]+ tokens") as caught:
        train(Greedy(error), sentences(60), None, settings(tmp_path, batch_size=8, save_every=2))
    assert "batch_size" in str(caught.value)
    assert "step-00000002" in str(caught.value), "the last checkpoint is named"
    assert checkpoint.complete(tmp_path / "checkpoints")
    if error is None:
        assert str(2**60) in str(caught.value), "how much was asked for"


def test_other_errors_of_a_model_are_its_own(tmp_path):
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(Greedy(RuntimeError("mat1 and mat2 shapes cannot be multiplied")), sentences(60), None, settings(tmp_path))


def test_evaluation_that_is_not_finite(tmp_path):
    class Bad(FakeModel):
        def forward(self, batch, **options):
            out = super().forward(batch, **options)
            if not self.training:
                out.nll = out.nll * float("inf")
            return out

    with pytest.raises(NumericalError, match="evaluation gave a reconstruction and elbo"):
        run(tmp_path, model=Bad())


class Signal(Callback):
    def __init__(self, step, *numbers):
        self.at, self.numbers = step, numbers

    def on_step(self, run):
        if run.step == self.at:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_usable_checkpoint(tmp_path, number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    result = run(tmp_path / "a", Signal(5, number))
    assert (result.stop_reason, result.step, result.interrupted) == (signal.Signals(number).name, 5, True)
    assert result.checkpoint.name == "step-00000005"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    result = run(tmp_path / "a", resume=True)
    unbroken = run(tmp_path / "b")
    assert_same_checkpoint(result.checkpoint, unbroken.checkpoint)


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Signal(5, signal.SIGINT, signal.SIGINT))


def test_a_signal_in_the_last_step_is_completion(tmp_path):
    assert run(tmp_path, Signal(24, signal.SIGINT)).stop_reason == "completed"


def test_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert results[0].stop_reason == "completed"


def test_early_stop_and_best(tmp_path):
    """A learning rate far too high after the first evaluations: it stops, and the best checkpoint is kept."""

    class Spoil(Callback):
        def on_step(self, run):
            if run.step > 6:
                with torch.no_grad():
                    run.model.output.weight.add_(torch.randn_like(run.model.output.weight))

    options = dict(eval_every=2, save_every=2, early_stop=3, keep_checkpoints=1, beta_schedule="constant", epochs=9)
    result = run(tmp_path, Spoil(), **options)
    assert result.stop_reason == "early_stop"
    assert result.best["step"] == 6
    assert result.step == 6 + 3 * 2
    assert result.best_checkpoint.name == "step-00000006"
    assert result.checkpoint.name == "step-00000012"
    assert [r["improved"] for r in result.history if r["kind"] == "eval"][-3:] == [False] * 3
    again = run(tmp_path, resume=True, **options)
    assert (again.stop_reason, again.step) == ("early_stop", 12)


def test_plateau_lowers_the_rate(tmp_path):
    options = {"schedule": "plateau", "plateau_patience": 1, "eval_every": 1, "log_every": 1, "warmup_steps": 0}
    result = run(tmp_path, **options, learning_rate=1.0)
    rates = [record["learning_rate"] for record in result.history if record["kind"] == "train"]
    assert rates[0] == 1.0
    assert set(rates) <= {0.5**i for i in range(12)}
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 1.0


# -- callbacks -------------------------------------------------------------------------------------------------------


def test_callbacks_see_everything_in_order(tmp_path):
    events = []

    class Watch(Callback):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                return lambda run, *rest: events.append((name[3:], run.step, *rest))
            return super().__getattribute__(name)

    result = run(tmp_path, Watch(), epochs=1, save_every=4, eval_every=6)
    names = [(event, step) for event, step, *_ in events]
    steps = [("step", i) for i in range(1, 9)]
    expected = [
        ("train_begin", 0), *steps[:4], ("checkpoint", 4), *steps[4:5], ("log", 5), *steps[5:6], ("evaluate", 6),
        *steps[6:], ("log", 8), ("evaluate", 8), ("checkpoint", 8), ("train_end", 8),
    ]  # fmt: skip
    assert names == expected
    assert events[-1][2] == result
    assert events[-2][2] == result.checkpoint


def test_callbacks_hear_of_the_end_by_an_error(tmp_path):
    ended = []

    class Fails(Callback):
        def on_step(self, run):
            raise ZeroDivisionError

        def on_train_end(self, run, result):
            ended.append(result)

    with pytest.raises(ZeroDivisionError):
        run(tmp_path, Fails())
    assert ended == [None]


def test_tensorboard_and_progress(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, StopAt(12), tensorboard=True, progress=True)
    result = run(tmp_path, tensorboard=True, progress=True, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = {(e.step, round(e.value, 3)) for e in events.Scalars("train/elbo")}
    expected = {(r["step"], round(r["elbo"], 3)) for r in result.history if r["kind"] == "train"}
    assert {step for step, _ in scalars} == {step for step, _ in expected}
    assert "eval/active_units" in events.Tags()["scalars"]
    bar = capsys.readouterr().err
    assert "24/24" in bar
    assert all(word in bar for word in ("elbo=", "kl=", "tok_s=", "eval_elbo="))


def test_without_tensorboard_it_says_so(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match="tensorboard is not installed"):
        run(tmp_path, tensorboard=True)


def test_metrics_after_a_kill_are_cut_to_the_checkpoint(tmp_path):
    run(tmp_path, StopAt(12))
    log = tmp_path / "metrics.jsonl"
    kept = read_records(log)
    with open(log, "a") as file:
        file.write('{"kind": "train", "step": 15, "loss": 1.0}\n{"kind": "train", "step": 20, "lo')
    result = run(tmp_path, resume=True)
    assert result.history[: len(kept)] == kept
    assert [r["step"] for r in result.history if r["kind"] == "train"] == [5, 10, 15, 20, 24]
    assert 1.0 not in [r["loss"] for r in result.history]


# -- what is refused -------------------------------------------------------------------------------------------------


def test_unwritable_output_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    model = FakeModel()
    model.tokenize = None
    for folder in (tmp_path / "file" / "below", "/proc/lmvae"):
        with pytest.raises(OutputError, match="choose a folder you can write to"):
            train(model, sentences(5), None, settings(folder))


def test_a_disk_that_fills_up_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    from lmvae_fast import files

    class Fill(Callback):
        def on_step(self, run):
            if run.step == 10:
                monkeypatch.setattr(files, "save_file", self.full)

        @staticmethod
        def full(*args):
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"earlier checkpoints are untouched.*free space"):
        run(tmp_path / "a", Fill())
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "a/checkpoints").iterdir()] == ["step-00000008"]
    result = run(tmp_path / "a", resume=True)
    assert_same_checkpoint(result.checkpoint, run(tmp_path / "b").checkpoint)


def test_bad_arguments(tmp_path):
    with pytest.raises(ConfigError, match="give eval_data"):
        run(tmp_path, evaluated=False, early_stop=3)
    with pytest.raises(ConfigError, match="give eval_data"):
        run(tmp_path, evaluated=False, schedule="plateau")
    with pytest.raises(ConfigError, match=r"float32 master weights.*bfloat16"):
        run(tmp_path, model=FakeModel().bfloat16())
    with pytest.raises(ConfigError, match="no trainable parameter"):
        run(tmp_path, model=FakeModel().requires_grad_(False))
    with pytest.raises(DataError):
        train(FakeModel(), [], None, settings(tmp_path))
    with pytest.raises(CheckpointError, match="no checkpoint folder there"):
        run(tmp_path, resume=str(tmp_path / "absent"))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_max_steps_and_training_the_encoder(tmp_path):
    model = FakeModel(train_encoder=True)
    before = model.table.weight.detach().clone()
    result = run(tmp_path, model=model, max_steps=11)
    assert (result.step, result.epoch) == (11, 11 / 8)
    assert not torch.equal(before, model.table.weight)
    assert model.pool_calls == 0
    assert TrainConfig().max_steps is None
