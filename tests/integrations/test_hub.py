"""Hugging Face: Auto classes, saving, the hub, pipelines, datasets.map and Trainer."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, BertConfig, Trainer, TrainingArguments, pipeline

from lmvae_fast.config import TrainConfig
from lmvae_fast.errors import CheckpointError, ConfigError, DataError, LatentError, OutputError
from lmvae_fast.integrations.hub import (
    BetaSchedule,
    Collator,
    PretrainedLMVAE,
    PretrainedLMVAEConfig,
    encode_columns,
    tokenize_columns,
)
from lmvae_fast.integrations.saving import save_beside
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.testing import SENTENCES, make_model
from lmvae_fast.training.schedule import beta_at


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "model"
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(saved):
    return AutoModel.from_pretrained(saved)


def batch_of(model, sentences=SENTENCES[:3]):
    rows = tokenize_columns(model)({"text": list(sentences)})
    return Collator(model)([{"input_ids": ids} for ids in rows["input_ids"]])


def test_auto_classes_read_a_folder_of_ours(saved, loaded):
    config = AutoConfig.from_pretrained(saved)
    assert isinstance(config, PretrainedLMVAEConfig) and config.lmvae["latent_dim"] == config.hidden_size == 6
    assert isinstance(loaded, PretrainedLMVAE) and not loaded.training
    ours = LMVAE.from_pretrained(saved)
    assert torch.equal(loaded.lmvae.encode(SENTENCES[:2]).mu, ours.encode(SENTENCES[:2]).mu)
    assert AutoModel.from_pretrained(saved, dtype=torch.bfloat16).lmvae.decoder.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="device_map"):
        AutoModel.from_pretrained(saved, device_map="auto")


def test_what_a_download_is_asked_for_is_passed_on(saved, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or saved
    )
    model = PretrainedLMVAE.from_pretrained("someone/model", revision="v2", token="t", cache_dir=None)
    assert asked == [("someone/model", {"revision": "v2", "token": "t"})] and model.lmvae.config.latent_dim == 6
    within = PretrainedLMVAE.from_pretrained("someone/model", subfolder="../model")
    assert within.lmvae.config == model.lmvae.config
    with pytest.raises(CheckpointError, match="no such subfolder"):
        PretrainedLMVAE.from_pretrained("someone/model", subfolder="other")

    def offline(name, **options):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="someone/model"):
        PretrainedLMVAE.from_pretrained("someone/model")


def test_a_configuration_that_was_changed_is_honoured(saved):
    config = AutoConfig.from_pretrained(saved)
    config.lmvae["kl_target"] = 0.25
    assert AutoModel.from_pretrained(saved, config=config).lmvae.config.kl_target == 0.25
    with pytest.raises(ConfigError, match="PretrainedLMVAEConfig"):
        PretrainedLMVAE.from_pretrained(saved, config=BertConfig())


def test_labels_give_the_loss_and_ids_the_posterior(loaded):
    model, inputs = loaded, batch_of(loaded.lmvae)
    torch.manual_seed(0)
    out = model(**inputs, beta=0.5)
    torch.manual_seed(0)
    want = model.lmvae(list(SENTENCES[:3]), beta=0.5)
    assert torch.equal(out.loss, want.loss) and torch.equal(out.kl, want.kl.detach())
    out.loss.backward()
    assert model.lmvae.projector.weight.grad is not None
    alone = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(alone.mu, model.lmvae.encode(SENTENCES[:3]).mu)
    assert alone.loss is None and isinstance(model(**inputs, return_dict=False), tuple)


def test_saving(loaded, tmp_path):
    loaded.save_pretrained(tmp_path / "new")
    loaded.save_pretrained(tmp_path / "new")
    beside = tmp_path / "run"
    beside.mkdir()
    (beside / "trainer_state.json").write_text("{}")
    for _ in range(2):
        loaded.save_pretrained(beside)
    assert sorted(path.name for path in beside.iterdir()) == sorted(
        [*(path.name for path in (tmp_path / "new").iterdir()), "trainer_state.json"]
    )
    assert torch.equal(AutoModel.from_pretrained(beside).lmvae.projector.weight, loaded.lmvae.projector.weight)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "README.md").write_text("mine")
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"README\.md"):
        loaded.save_pretrained(foreign)
    assert sorted(path.name for path in foreign.iterdir()) == ["README.md", "thesis.txt"]
    with pytest.raises(ConfigError, match="state_dict"):
        loaded.save_pretrained(tmp_path / "other", state_dict={})


def test_push_to_hub_uploads_a_model_with_a_card_that_renders(loaded, tmp_path, monkeypatch):
    import huggingface_hub

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, name, private, exist_ok):
            return f"https://hub/{name}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            import shutil

            shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert loaded.push_to_hub("someone/model") == "https://hub/someone/model"
    card = huggingface_hub.ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.library_name == "lmvae_fast" and "variational-autoencoder" in card.data.tags
    assert card.text.count("```") % 2 == 0 and "{" not in card.text.replace("{'", "")
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["model_type"] == "lmvae"
    with pytest.raises(ConfigError, match="revision"):
        loaded.push_to_hub("someone/model", revision="x")


def test_pipelines(saved, loaded):
    to_latent = pipeline("text2latent", model=str(saved))
    mu = loaded.lmvae.encode(SENTENCES[:3]).mu
    assert to_latent(SENTENCES[0]) == pytest.approx(mu[0].tolist(), abs=1e-6)
    torch.testing.assert_close(to_latent(list(SENTENCES[:3]), return_tensors=True), mu)
    to_text = pipeline("latent2text", model=loaded)
    texts = loaded.lmvae.decode(mu)
    assert to_text(mu) == texts and to_text(mu.numpy()) == texts and to_text(mu.tolist()) == texts
    assert to_text(mu[0].tolist()) == texts[0] and to_text([]) == []
    assert to_text(mu, max_new_tokens=2) == loaded.lmvae.decode(mu, max_new_tokens=2)
    for call, error, message in (
        (lambda: to_latent("a", top_k=3), ConfigError, "top_k"),
        (lambda: to_latent([3]), DataError, "sentences"),
        (lambda: to_text(mu, no_such=1), ConfigError, "no_such"),
        (lambda: to_text(mu, batch_size=2), ConfigError, "batch_size"),
        (lambda: to_text([[1.0], [1.0, 2.0]]), LatentError, "one width"),
        (lambda: to_text(mu[:, :3]), LatentError, "latent"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_encoding_by_columns(loaded):
    rows = {"text": list(SENTENCES[:4])}
    columns = encode_columns(loaded.lmvae)(rows)
    want = loaded.lmvae.encode(SENTENCES[:4])
    assert columns["mu"] == want.mu.tolist() and columns["logvar"] == want.logvar.tolist()
    with pytest.raises(DataError, match="no such column"):
        encode_columns(loaded.lmvae, "sentence")(rows)


def test_datasets_map(loaded):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": list(SENTENCES)})
    coded = data.map(encode_columns(loaded.lmvae), batched=True, batch_size=3)
    want = loaded.lmvae.encode(SENTENCES)
    torch.testing.assert_close(torch.tensor(coded["mu"][:]), want.mu, rtol=1e-5, atol=1e-6)


def test_trainer_trains_saves_and_resumes(saved, tmp_path):
    def trainer(steps):
        model = AutoModel.from_pretrained(saved)
        rows = [{"input_ids": ids} for ids in tokenize_columns(model.lmvae)({"text": list(SENTENCES)})["input_ids"]]
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, per_device_train_batch_size=4, learning_rate=3e-2, save_steps=3,
            report_to=[], disable_tqdm=True, logging_steps=1, eval_strategy="steps", eval_steps=3, seed=0, use_cpu=True,
        )  # fmt: skip
        schedule = BetaSchedule(TrainConfig(beta_cycles=1))
        return Trainer(
            model, arguments, data_collator=Collator(model.lmvae), train_dataset=rows, eval_dataset=rows,
            callbacks=[schedule],
        )  # fmt: skip

    first = trainer(6)
    first.train()
    losses = [log["loss"] for log in first.state.log_history if "loss" in log]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert first.model.lmvae.beta == beta_at(5, 6, TrainConfig(beta_cycles=1))
    assert any("eval_loss" in log for log in first.state.log_history)
    checkpoint = tmp_path / "run" / "checkpoint-6"
    assert torch.equal(LMVAE.from_pretrained(checkpoint).projector.weight, first.model.lmvae.projector.weight)
    first.save_model(str(tmp_path / "run"))  # beside its checkpoints
    assert torch.equal(LMVAE.from_pretrained(tmp_path / "run").projector.weight, first.model.lmvae.projector.weight)
    second = trainer(9)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == 9
    assert not torch.equal(second.model.lmvae.projector.weight, first.model.lmvae.projector.weight)


def test_what_is_refused(loaded):
    for inputs, error, message in (
        ({}, DataError, "neither"),
        ({"labels": torch.full((2, 3), -100)}, DataError, "1 to max_len"),
        ({"input_ids": torch.ones(1, 50, dtype=torch.int64)}, DataError, "1 to max_len"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64), "pixel_values": 1}, ConfigError, "pixel_values"),
    ):
        with pytest.raises(error, match=message):
            loaded(**inputs)
    with pytest.raises(ConfigError, match="another model"):
        loaded.load_state_dict({"nothing.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match="single texts"):
        PretrainedLMVAE.of(make_model("llama", system="cvae", queries=2))
    with pytest.raises(ConfigError, match="annotations"):
        PretrainedLMVAE.of(make_model(annotations=("a", "b")))
    with pytest.raises(ConfigError):
        PretrainedLMVAEConfig(latent_dim=-3)
    with pytest.raises(ConfigError, match=r"hub\.model\.PretrainedLMVAE.*pass its \.lmvae"):
        PretrainedLMVAE.of(loaded)


def test_a_file_of_the_users_within_a_part_is_left_where_it_is(tmp_path):
    (tmp_path / "trainer_state").mkdir()
    (tmp_path / "trainer_state" / "of.another").write_text("theirs")
    model = make_model("gpt2")
    save_beside(model, tmp_path)
    save_beside(model, tmp_path)
    (tmp_path / "decoder" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"not written with it.*notes\.txt"):
        save_beside(model, tmp_path)
    assert (tmp_path / "decoder" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "trainer_state" / "of.another").read_text() == "theirs"
