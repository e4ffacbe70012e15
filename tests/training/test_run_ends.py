"""How a run ends: NaN, memory, signals, early stop."""

import os
import signal
import threading

import pytest
import torch

from lmvae_fast.errors import MemoryLimitError, NumericalError
from lmvae_fast.training import Callback, train
from lmvae_fast.training.checkpoints import folder as checkpoint
from lmvae_fast.training.loop import Trainer
from tests.training.fake_model import FakeModel, sentences
from tests.training.helpers import assert_same_checkpoint, run, settings

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
        train(
            Greedy(RuntimeError("mat1 and mat2 shapes cannot be multiplied")), sentences(60), None, settings(tmp_path)
        )


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
