"""LangVAE's README example with its imports changed, and a run's batches, beta, steps, best model, files and refusals."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.integrations.langvae import (
    CyclicalScheduleKLThresholdTrainerConfig,
    LanguageTrainingPipeline,
    LangVAE,
    TokenizedAnnotatedDataSet,
    TokenizedDataSet,
    TrainingCallback,
)
from lmvae_fast.integrations.langvae.pipeline import sentences_of
from lmvae_fast.testing import SENTENCES, make_model
from lmvae_fast.training.schedule import cyclical_beta
from tests.integrations.langvae.parts_on_disk import MAX_LEN, NZ, build, write_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


def dataset(model, sentences=SENTENCES):
    return TokenizedDataSet(list(sentences), model.decoder.tokenizer, model.decoder.max_len)


def config(folder, **fields):
    options = dict(
        output_dir=str(folder), num_epochs=2, per_device_train_batch_size=3, per_device_eval_batch_size=3,
        optimizer_cls="AdamW", learning_rate=1e-2, max_beta=1.0, n_cycles=2, target_kl=0.5,
    )  # fmt: skip
    return CyclicalScheduleKLThresholdTrainerConfig(**{**options, **fields})


class Watch(TrainingCallback):
    """Every event with what it knows."""

    def __init__(self):
        self.events, self.logs = [], []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return object.__getattribute__(self, name)

        def note(training_config, **known):
            self.events.append(name)
            if "logs" in known:
                self.logs.append(known["logs"])

        return note


def test_steps_are_those_of_the_eager_langvae(parts, tmp_path, monkeypatch):
    """Losses, order of batches, beta's jumps, Adam's steps: the trajectory of a run is that of the plain arithmetic."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    model = build(parts)
    model.engine_for({})
    model.lmvae.projector.dropout = 0.0
    data = dataset(model, SENTENCES[:7])
    reference = build(parts)
    reference.engine_for({})
    reference.load_state_dict(model.state_dict())
    reference.lmvae.projector.dropout = 0.0
    from lmvae_fast.models import latents

    # No noise: every draw is the posterior's mean, on either side.
    true = latents.sample_with_kl
    zeros = lambda p, **o: true(p, **{**o, "eps": torch.zeros_like(p.mu)})  # noqa: E731
    monkeypatch.setattr(latents, "sample_with_kl", zeros)

    watch = Watch()
    pipeline = LanguageTrainingPipeline(config(tmp_path, num_epochs=3), model)
    pipeline(data, callbacks=[watch])

    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    count, size, epochs = 7, 3, 3
    per_epoch = count // size + count % size  # as LangVAE counts them
    reference.target_kl = 0.5
    losses = []
    for epoch in range(epochs):
        found = []
        for i, start in enumerate(range(0, count, size)):
            step = epoch * per_epoch + i
            reference.cur_beta = cyclical_beta(step, epochs * per_epoch, cycles=2, zero=0.25, increase=0.25)
            out = reference.train()({"data": data[start : min(start + size, count)]["data"]})
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            found.append(out.loss.item())
        losses.append(sum(found) / len(found))
    assert [log["train_epoch_loss"] for log in watch.logs] == pytest.approx(losses, rel=1e-4)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=2e-4, msg=name)


def test_a_run_with_evaluation_checkpoints_and_callbacks(parts, tmp_path):
    model, watch = build(parts), Watch()
    pipeline = LanguageTrainingPipeline(training_config=config(tmp_path, num_epochs=3, steps_saving=2), model=model)
    pipeline(train_data=dataset(model), eval_data=dataset(model, SENTENCES[:4]), callbacks=[watch])
    folder = pipeline.training_dir
    assert folder.parent == tmp_path and folder.name.startswith("VAE_training_")
    assert json.loads((folder / "training_config.json").read_text())["target_kl"] == 0.5
    assert [path.name for path in sorted(folder.glob("checkpoint_epoch_*"))] == ["checkpoint_epoch_2"]
    best = min(log["eval_epoch_loss"] for log in watch.logs)
    assert pipeline.result.best["loss"] == pytest.approx(best)
    z = torch.randn(2, NZ)
    final = LangVAE.load_from_folder(folder / "final_model")
    assert len(final.decode_sentences(z)) == 2
    epochs = [name for name in watch.events if name.startswith("on_epoch") or name == "on_log"]
    assert epochs == ["on_epoch_begin", "on_epoch_end", "on_log"] * 3
    assert watch.events[0] == "on_train_begin" and watch.events[-1] == "on_train_end"
    assert watch.events.count("on_train_step_end") == 3 * 3 and watch.events.count("on_eval_step_end") == 3


def test_the_final_model_is_the_best_epochs(parts, tmp_path):
    """A KL whose weight rises in the second epoch: the first is the best, and the model that trained is another one."""
    model, watch = build(parts), Watch()
    rising = dict(max_beta=1000.0, n_cycles=1, target_kl=0.0)
    LanguageTrainingPipeline(config(tmp_path, num_epochs=2, keep_best_on_train=True, steps_saving=1, **rising), model)(
        dataset(model), dataset(model), [watch]
    )
    folder = next(tmp_path.iterdir())
    first, second = (log["train_epoch_loss"] for log in watch.logs)
    assert first < second
    final, early = (LangVAE.load_from_folder(folder / name) for name in ("final_model", "checkpoint_epoch_1"))
    assert torch.equal(final.encoder.linear.weight, early.encoder.linear.weight)
    assert not torch.equal(final.encoder.linear.weight, model.encoder.linear.weight)


def test_the_plateau_is_asked_once_an_epoch(parts, tmp_path):
    model, watch = build(parts), Watch()
    plateau = dict(scheduler_cls="ReduceLROnPlateau", scheduler_params={"patience": 0, "factor": 0.1})
    pipeline = LanguageTrainingPipeline(config(tmp_path, num_epochs=4, learning_rate=0.3, **plateau), model)
    pipeline(dataset(model), callbacks=[watch])
    losses = [log["train_epoch_loss"] for log in watch.logs]
    rate, best, expected = 0.3, float("inf"), []
    for loss in losses:
        expected.append(rate)
        if loss < best * (1 - 1e-4):
            best = loss
        else:
            rate *= 0.1
    rates = [r["learning_rate"] for r in pipeline.result.history if r["kind"] == "train"]
    assert rates[::3] == pytest.approx(expected) and len(set(expected)) > 1


def test_labels_are_pooled_over_their_batch(parts, tmp_path):
    words = [["a", "cat", "sleeps"], ["the", "sun", "is", "a", "star"], ["ice"]]
    roles = [["O", "A", "V"], ["O", "A", "V", "O", "P"], ["A"]]
    model = build(parts, conditional=True)
    data = TokenizedAnnotatedDataSet((words, roles), model.decoder.tokenizer, MAX_LEN, {"srl": ["O", "A", "V", "P"]})
    sentences, columns = sentences_of(data, model, 2)
    assert columns == {"srl": 4}
    longest = max(map(len, data.ids[:2]))
    weights = torch.linspace(0.1, 1, longest) / longest
    assert torch.allclose(sentences.annotations[0], torch.stack([weights[0], weights[1], weights[2], weights[0] * 0]))
    assert torch.allclose(sentences.annotations[2], torch.tensor([0.0, 0.1 / len(data.ids[2]), 0, 0]))
    LanguageTrainingPipeline(config(tmp_path, num_epochs=1), model)(data)
    assert model.encoder.annotated


README = """
import sys
import lmvae_fast.integrations.langvae
lmvae_fast.integrations.langvae.install()

from pythae.models.vae import VAEConfig
from langvae import LangVAE
from langvae.encoders import SentenceEncoder
from langvae.decoders import SentenceDecoder
from langvae.data_conversion.tokenization import TokenizedDataSet
from langvae.pipelines import LanguageTrainingPipeline
from langvae.trainers import CyclicalScheduleKLThresholdTrainerConfig
from langvae.trainers.training_callbacks import TensorBoardCallback

from lmvae_fast.testing import SENTENCES
parts, output = sys.argv[1:]
decoder = SentenceDecoder(parts + "/gpt2", 4, 8, device="cpu", device_map="auto")
encoder = SentenceEncoder(parts + "/bert", 4, decoder.tokenizer, caching=True, device="cpu")
train = TokenizedDataSet(
    sorted(SENTENCES[:6], key=len, reverse=True), decoder.tokenizer, decoder.max_len, caching=True,
    cache_persistence=output + "/train.jsonl",
)
held_out = TokenizedDataSet(list(SENTENCES[6:]), decoder.tokenizer, decoder.max_len, caching=True)
model = LangVAE(VAEConfig(latent_dim=4), encoder, decoder)
config = CyclicalScheduleKLThresholdTrainerConfig(
    output_dir=output, num_epochs=2, learning_rate=1e-3, per_device_train_batch_size=3, per_device_eval_batch_size=3,
    steps_saving=1, optimizer_cls="AdamW", scheduler_cls="ReduceLROnPlateau",
    scheduler_params={"patience": 5, "factor": 0.5}, max_beta=1.0, n_cycles=2, target_kl=2.0, keep_best_on_train=True,
)
pipeline = LanguageTrainingPipeline(training_config=config, model=model)
pipeline(train_data=train, eval_data=held_out, callbacks=[TensorBoardCallback("readme")])
z, _ = model.encode_z(train[:2]["data"])
print("decoded", model.decode_sentences(z))
"""


def test_the_readme_of_langvae_runs_unchanged_after_install(parts, tmp_path):
    pytest.importorskip("tensorboard")
    run = subprocess.run(
        [sys.executable, "-c", README, str(parts), str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "decoded [" in run.stdout
    assert (tmp_path / "train.jsonl").is_file() and list((tmp_path / "runs").iterdir())
    assert list(tmp_path.glob("VAE_training_*/final_model/decoder.pt"))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"train_dataloader_num_workers": 2}, "train_dataloader_num_workers"),
        ({"eval_dataloader_num_workers": 2}, "eval_dataloader_num_workers"),
        ({"steps_predict": 3}, "steps_predict"),
        ({"world_size": 2}, "world_size"),
        ({"local_rank": 0}, "local_rank"),
        ({"rank": 0}, "rank"),
        ({"dist_backend": "gloo"}, "dist_backend"),
        ({"master_addr": "10.0.0.1"}, "master_addr"),
        ({"master_port": "1"}, "master_port"),
        ({"optimizer_cls": "SGD"}, "optimizer_cls"),
        ({"optimizer_params": {"amsgrad": True}}, "amsgrad"),
        ({"optimizer_params": {"momentum": 0.9}}, "momentum"),
        ({"optimizer_cls": "Adam", "optimizer_params": {"weight_decay": 0.1}}, "weight_decay"),
        ({"scheduler_cls": "StepLR"}, "scheduler_cls"),
        ({"scheduler_cls": "ReduceLROnPlateau", "scheduler_params": {"cooldown": 2}}, "cooldown"),
        ({"amp": True, "no_cuda": True}, "amp"),
        ({"num_epochs": 0}, "epochs"),
        ({"target_kl": -1}, "target_kl"),
        ({"max_beta": -1}, "beta"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_fields_that_cannot_be_honoured_are_errors_by_name(tmp_path, fields, name):
    with pytest.raises(ConfigError, match=name):
        config(tmp_path, **fields)


def test_defaults_are_the_originals(tmp_path):
    assert CyclicalScheduleKLThresholdTrainerConfig().to_dict() == {
        "output_dir": None, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 64, "num_epochs": 100,
        "train_dataloader_num_workers": 0, "eval_dataloader_num_workers": 0, "optimizer_cls": "Adam",
        "optimizer_params": None, "scheduler_cls": None, "scheduler_params": None, "learning_rate": 1e-4,
        "steps_saving": None, "steps_predict": None, "keep_best_on_train": False, "seed": 8, "no_cuda": False,
        "world_size": -1, "local_rank": -1, "rank": -1, "dist_backend": "nccl", "master_addr": "localhost",
        "master_port": "12345", "amp": False, "max_beta": 1.0, "n_cycles": 1, "target_kl": 2.0,
        "name": "CyclicalScheduleKLThresholdTrainerConfig",
    }  # fmt: skip


def test_other_models_and_data_are_refused(parts, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="must be a LangVAE"):
        LanguageTrainingPipeline(config(tmp_path), make_model())
    model = build(parts)
    with pytest.raises(ConfigError, match="CyclicalScheduleKLThresholdTrainerConfig"):
        LanguageTrainingPipeline({"num_epochs": 1}, model)
    pipeline = LanguageTrainingPipeline(config(tmp_path), model)
    with pytest.raises(DataError, match="no 'data'"):
        pipeline([{"text": "a cat"}])
    with pytest.raises(DataError, match="a dataset with rows"):
        pipeline([])
    long = TokenizedDataSet(["a cat is a kind of animal that needs food to live"], model.decoder.tokenizer, 50)
    with pytest.raises(DataError, match="longer than the decoder"):
        pipeline(long)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        LanguageTrainingPipeline(CyclicalScheduleKLThresholdTrainerConfig(), model)
    assert not list(tmp_path.iterdir())


def test_model_and_configuration_come_in_either_order(parts, tmp_path):
    model, settings = build(parts), config(tmp_path)
    for pipeline in (
        LanguageTrainingPipeline(model, settings), LanguageTrainingPipeline(settings, model),
        LanguageTrainingPipeline(training_config=settings, model=model),
    ):  # fmt: skip
        assert pipeline.model is model and pipeline.training_config is settings
