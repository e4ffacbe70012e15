"""The training loop: what it computes, how it ends, and what it refuses."""

import pytest
import torch

from lmvae_fast.config import TrainConfig
from lmvae_fast.errors import CheckpointError, ConfigError, DataError, OutputError
from lmvae_fast.training import Callback, train
from lmvae_fast.training.callbacks import read_records
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
        ("checkpoint", 6), *steps[6:], ("log", 8), ("evaluate", 8), ("checkpoint", 8), ("train_end", 8),
    ]  # fmt: skip
    assert names == expected
    assert events[-1][2] == result
    assert events[-2][2] == result.checkpoint


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_best_evaluation_has_its_checkpoint(tmp_path, keep_best):
    result = run(tmp_path, epochs=1, save_every=100, eval_every=3, keep_best=keep_best, learning_rate=0.01)
    assert result.best is not None
    assert (result.best_checkpoint is not None) == (keep_best or result.best["step"] == result.step)


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
    for off in (torch.no_grad, torch.inference_mode):
        with off(), pytest.raises(ConfigError, match=rf"needs gradients.*{off.__name__}.*train outside"):
            run(tmp_path)
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
