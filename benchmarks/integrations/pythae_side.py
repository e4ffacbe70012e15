"""pythae's NormalSampler on the real LangVAE, which is one of its models; run by LangVAE's interpreter.

usage: python pythae_side.py CASE.json
"""

from __future__ import annotations

import json
import sys
import warnings

import torch
from langvae import LangVAE
from pythae.samplers import NormalSampler
from worker import serve

warnings.filterwarnings("ignore")


class PythaeSide:
    """A sampler around a model loaded from a checkpoint folder."""

    def __init__(self, case: dict) -> None:
        torch.set_num_threads(case["threads"])
        self.case = case
        self.model = LangVAE.load_from_folder(case["checkpoint"]).eval()

    def draw(self, count: int) -> torch.Tensor:
        """Samples from the prior."""
        return NormalSampler(self.model).sample(num_samples=count, batch_size=self.case["latents"])

    def check(self) -> dict:
        """Token ids of some draws up to their end; what LangVAE gives are the probabilities of each."""
        torch.manual_seed(0)
        ids, end = self.draw(8).argmax(-1), self.model.decoder.tokenizer.eos_token_id
        return {"ids": ids.masked_fill((ids == end).cumsum(1) > 0, end).tolist()}

    def sample(self) -> dict:
        """As many draws as the case says."""
        self.draw(self.case["latents"])
        return {}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        serve(PythaeSide(json.load(file)))
