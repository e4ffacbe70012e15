"""Runs in LangVAE 0.6.13's own environment: its training pipeline without noise and dropout.

Writes the loss of every epoch, and what the trained model decodes.

usage: python pipeline_child.py CHECKPOINT SETTINGS.json OUTPUT.json
"""

from __future__ import annotations

import json
import sys

import torch
from langvae import LangVAE
from langvae.data_conversion.tokenization import TokenizedDataSet
from langvae.pipelines import LanguageTrainingPipeline
from langvae.trainers import CyclicalScheduleKLThresholdTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback

checkpoint, settings_path, output = sys.argv[1:]
torch.set_num_threads(1)
with open(settings_path, encoding="utf-8") as file:
    settings = json.load(file)


def mean(mu, std):
    return mu, torch.zeros_like(mu)


class Losses(TrainingCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, training_config, logs, **kwargs):
        self.losses.append(logs["train_epoch_loss"])


LangVAE._sample_gauss = staticmethod(mean)
model = LangVAE.load_from_folder(checkpoint)
model.decoder.dropout.p = 0.0
data = TokenizedDataSet(settings["sentences"], model.decoder.tokenizer, model.decoder.max_len)
losses = Losses()
config = CyclicalScheduleKLThresholdTrainerConfig(**settings["config"])
LanguageTrainingPipeline(training_config=config, model=model)(data, callbacks=[losses])
with open(output, "w", encoding="utf-8") as file:
    texts = model.eval().decode_sentences(torch.tensor(settings["z"]))
    json.dump({"losses": losses.losses, "texts": texts}, file)
