"""LangVAE 0.6.13's side of the comparison; run by the Python of its own virtual environment (see `steps.py`).

usage: python langvae_side.py CASE.json
"""

from __future__ import annotations

import json
import sys
import warnings

import torch
from langvae import LangVAE
from langvae.data_conversion.tokenization import TokenizedDataSet, collate_sparse_fn
from safetensors.torch import load_file, save_file
from worker import serve

warnings.filterwarnings("ignore")


class LangVAESide:
    """A model loaded from a checkpoint folder, one batch, and torch's AdamW, as its trainer uses them."""

    def __init__(self, case: dict) -> None:
        torch.set_num_threads(case["threads"])
        self.model = LangVAE.load_from_folder(case["checkpoint"])
        # Encoder features cached, as in our runs.
        self.model.encoder.caching = True
        self.model.cur_beta, self.model.target_kl = case["beta"], case["target_kl"]
        data = TokenizedDataSet(
            case["sentences"], self.model.decoder.tokenizer, self.model.decoder.max_len, caching=True
        )
        self.batch = collate_sparse_fn([data[i] for i in range(len(case["sentences"]))])
        self.case = case
        self.optimizer: torch.optim.Optimizer | None = None

    def gradients(self, file: str) -> dict:
        """Loss without dropout under given noise; gradients into a file."""
        self.model.eval()
        eps = load_file(self.case["noise"])["eps"]
        sample, self.model._sample_gauss = self.model._sample_gauss, lambda mu, std: (mu + eps * std, eps)
        out = self.model(self.batch)
        out.loss.backward()
        self.model._sample_gauss = sample
        save_file({name: p.grad.contiguous() for name, p in self.model.named_parameters()}, file)
        self.model.zero_grad(set_to_none=True)
        return {"loss": out.loss.item()}

    def step(self) -> dict:
        """One training step."""
        if self.optimizer is None:
            self.model.train()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), self.case["learning_rate"])
        loss = self.model(self.batch).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        serve(LangVAESide(json.load(file)))
