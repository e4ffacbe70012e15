"""``make test-peers``: a run of our pipeline has the losses of the real LangVAE's, epoch by epoch, and decodes its strings."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.common.langvae_environment import langvae_python
from lmvae_fast.integrations.langvae import (
    CyclicalScheduleKLThresholdTrainerConfig,
    LanguageTrainingPipeline,
    LangVAE,
    TokenizedDataSet,
    TrainingCallback,
)
from lmvae_fast.models import latents

pytestmark = pytest.mark.peers


class Losses(TrainingCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, training_config, logs, **kwargs):
        self.losses.append(logs["train_epoch_loss"])


@pytest.mark.parametrize("name", ["langvae_gpt2", "langvae_llama"])
def test_epoch_losses_are_langvaes(shared, tmp_path, monkeypatch, name):
    checkpoint = shared / "golden" / name / "langvae_checkpoint"
    record = json.loads((shared / "golden" / name / "record.json").read_text())
    sentences = [*record["sentences"], "ice", "a cat is a"]  # some padding, and a last batch that is not full
    config = dict(
        num_epochs=4, per_device_train_batch_size=3, optimizer_cls="AdamW", learning_rate=3e-3, max_beta=1.0, n_cycles=2,
        target_kl=0.5, scheduler_cls="ReduceLROnPlateau", scheduler_params={"patience": 0, "factor": 0.5}, no_cuda=True,
    )  # fmt: skip
    settings, output = tmp_path / "settings.json", tmp_path / "losses.json"
    z = torch.randn(8, record["latent_dim"], generator=torch.Generator().manual_seed(0))
    theirs = {"z": z.tolist(), "sentences": sentences, "config": {**config, "output_dir": str(tmp_path / "theirs")}}
    settings.write_text(json.dumps(theirs))
    child = Path(__file__).with_name("pipeline_child.py")
    command = [str(langvae_python()), str(child), str(checkpoint), str(settings), str(output)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=checkpoint)  # its parts are named from there
    assert run.returncode == 0, run.stderr[-3000:]

    drawn = latents.sample_with_kl

    def mean(posterior, **options):
        return drawn(posterior, **{**options, "eps": torch.zeros_like(posterior.mu)})

    monkeypatch.setattr(latents, "sample_with_kl", mean)
    model = LangVAE.load_from_folder(checkpoint)
    model.decoder.projector.dropout = 0.0
    data, losses = TokenizedDataSet(sentences, model.decoder.tokenizer, model.decoder.max_len), Losses()
    ours = CyclicalScheduleKLThresholdTrainerConfig(output_dir=str(tmp_path / "ours"), **config)
    LanguageTrainingPipeline(training_config=ours, model=model)(data, callbacks=[losses])
    got = json.loads(output.read_text())
    assert losses.losses == pytest.approx(got["losses"], rel=1e-4)
    assert model.eval().decode_sentences(z) == got["texts"] and len(set(got["texts"])) > 1
    folders = [next((tmp_path / side).iterdir()).name for side in ("theirs", "ours")]
    assert folders[0].rpartition("_20")[0] == folders[1].rpartition("_20")[0]  # all but the time
