"""LangVAE 0.6.13's side of the comparison; run by the Python of its own virtual environment (see `decode.py`).

usage: python langvae_side.py CASE.json
"""

from __future__ import annotations

import json
import sys
import time
import warnings

import torch
from langvae import LangVAE
from safetensors.torch import load_file
from worker import serve

warnings.filterwarnings("ignore")


class LangVAESide:
    """A model loaded from a checkpoint folder, decoding as its users do."""

    def __init__(self, case: dict) -> None:
        torch.set_num_threads(case["threads"])
        self.model = LangVAE.load_from_folder(case["checkpoint"])
        self.model.eval()
        self.z = load_file(case["latents"])["z"]

    @torch.no_grad()
    def ids(self, batch: int) -> dict:
        """The tokens it decodes."""
        return {"ids": self.model.decoder(self.z[:batch])["reconstruction"].argmax(-1).tolist()}

    @torch.no_grad()
    def decode(self, batch: int) -> dict:
        """Latents to strings, and the processor time of all threads that it took."""
        start = time.process_time()
        self.model.decode_sentences(self.z[:batch])
        return {"cpu_seconds": time.process_time() - start}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        serve(LangVAESide(json.load(file)))
