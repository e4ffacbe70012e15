"""LangVAE 0.6.13 learning for a given CPU time; run by the Python of its own virtual environment (see `learning.py`).

usage: python langvae_learning.py CASE.json
"""

from __future__ import annotations

import json
import random
import sys
import time
import warnings

import torch
from langvae import LangVAE
from langvae.data_conversion.tokenization import TokenizedDataSet, collate_sparse_fn
from safetensors.torch import save_file
from worker import serve

warnings.filterwarnings("ignore")


class LangVAELearning:
    """A model loaded from a checkpoint folder, its own loss, and torch's AdamW, as its trainer uses them."""

    def __init__(self, case: dict) -> None:
        torch.set_num_threads(case["threads"])
        torch.manual_seed(case["seed"])
        self.case, self.order, self.steps = case, random.Random(case["seed"]), 0
        self.model = LangVAE.load_from_folder(case["checkpoint"])
        self.model.encoder.caching = True
        self.model.cur_beta, self.model.target_kl = case["langvae_beta"], 0.0
        self.data = TokenizedDataSet(
            case["sentences"], self.model.decoder.tokenizer, self.model.decoder.max_len, caching=True
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), case["learning_rate"])
        self.model.train()
        self.rows: list[int] = []
        self.started = time.process_time()

    def learn(self, cpu_seconds: float, file: str) -> dict:
        """Train until this much CPU time has gone in all, then write the trained weights."""
        loss = 0.0
        while time.process_time() - self.started < cpu_seconds:
            if len(self.rows) < self.case["batch"]:
                self.rows = list(range(len(self.data)))
                self.order.shuffle(self.rows)
            batch, self.rows = self.rows[: self.case["batch"]], self.rows[self.case["batch"] :]
            out = self.model(collate_sparse_fn([self.data[row] for row in batch]))
            self.optimizer.zero_grad()
            out.loss.backward()
            self.optimizer.step()
            loss, self.steps = out.loss.item(), self.steps + 1
        save_file({name: p.detach().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}, file)
        return {"steps": self.steps, "loss": loss, "cpu_seconds": time.process_time() - self.started}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        serve(LangVAELearning(json.load(file)))
