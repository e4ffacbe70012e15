"""LangVAE's own example, by LangVAE's names: run by its own interpreter, and, unchanged, on `lmvae_fast` after `install()`.

usage: python langvae_side.py CASE.json
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings

import torch
from langvae import LangVAE
from langvae.data_conversion.tokenization import TokenizedDataSet
from langvae.pipelines import LanguageTrainingPipeline
from langvae.trainers import CyclicalScheduleKLThresholdTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback
from worker import serve

warnings.filterwarnings("ignore")


class Watch(TrainingCallback):
    """Losses and seconds of epochs."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def on_epoch_begin(self, training_config, **kwargs) -> None:
        self.began = time.perf_counter()

    def on_epoch_end(self, training_config, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.began)

    def on_log(self, training_config, logs, **kwargs) -> None:
        self.losses.append(logs["train_epoch_loss"])


def without_noise(model) -> None:
    """Every draw is the posterior's mean, and nothing is dropped."""
    model._sample_gauss = lambda mu, std: (mu, torch.zeros_like(mu))
    model.decoder.dropout.p = 0.0


class LangVAESide:
    """A model loaded from a checkpoint folder, LangVAE's training pipeline on it, and its decoding."""

    def __init__(self, case: dict) -> None:
        torch.set_num_threads(case["threads"])
        self.case = case
        self.model = self.load()
        generator = torch.Generator().manual_seed(0)
        self.z = torch.randn(case["latents"], self.model.latent_dim, generator=generator)

    def load(self) -> LangVAE:
        """The model as the checkpoint holds it, pooled features kept."""
        model = LangVAE.load_from_folder(self.case["checkpoint"])
        model.encoder.caching = True
        return model

    def run(self, model: LangVAE, epochs: int) -> Watch:
        """LangVAE's pipeline over the case's sentences, its files in a folder that is thrown away."""
        data = TokenizedDataSet(self.case["data"], model.decoder.tokenizer, model.decoder.max_len, caching=True)
        watch = Watch()
        with tempfile.TemporaryDirectory() as folder:
            config = CyclicalScheduleKLThresholdTrainerConfig(
                output_dir=folder, num_epochs=epochs, learning_rate=1e-4, optimizer_cls="AdamW", no_cuda=True,
                per_device_train_batch_size=self.case["batch"], max_beta=self.case["beta"], n_cycles=1,
                target_kl=self.case["target_kl"],
            )  # fmt: skip
            LanguageTrainingPipeline(training_config=config, model=model)(data, callbacks=[watch])
        return watch

    def check(self) -> dict:
        """Losses of an epoch without noise, and the texts of some latents."""
        model = self.load()
        texts = model.eval().decode_sentences(self.z[:8])
        without_noise(model)
        return {"numbers": self.run(model, 1).losses, "texts": texts}

    def epoch(self) -> dict:
        """A run of one epoch: the seconds of its steps; those of the whole call are the request's."""
        return {"steps_seconds": self.run(self.model, 1).seconds[0]}

    def decode(self) -> dict:
        """Sentences of the latents."""
        self.model.eval()
        self.model.decode_sentences(self.z)
        return {}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        serve(LangVAESide(json.load(file)))
