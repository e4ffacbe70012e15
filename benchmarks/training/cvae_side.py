"""One side of the comparison of CVAE training steps.

usage: python -m benchmarks.training.cvae_side CASE.json ours|bf16|twin|compiled
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmvae_fast as lf
from benchmarks.common.worker import peak_bytes, serve
from benchmarks.training.trainer_side import TrainerSide
from lmvae_fast.integrations.cvae import load_checkpoint
from lmvae_fast.models.systems.cvae import objective_of
from lmvae_fast.reference.cvae import SAMPLES, ReferenceCVAE
from lmvae_fast.reference.cvae_parts import CVAESettings
from lmvae_fast.training.loop import Trainer

warnings.filterwarnings("ignore")

LATENT = 32
ADAMW: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.0, "fused": True}


def twin_of(case: dict) -> ReferenceCVAE:
    """The eager CVAE, its posterior moved from where it begins: at the prior there is nothing to compare."""
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_pretrained(case["decoder"])
    tokenizer = AutoTokenizer.from_pretrained(case["decoder"])
    settings = CVAESettings(latent_dim=LATENT, stage=2, padding="masked")
    model = ReferenceCVAE(
        decoder, tokenizer, settings, max_prompt=case["max_prompt"], max_response=case["max_response"]
    )
    with torch.no_grad():
        for parameter in model.latent_encoder.parameters():
            if parameter.dim() == 2 and not parameter.abs().any():
                parameter.normal_(std=0.02)
    return model


def save_both(case: dict, folder: Path) -> None:
    """Write the twin's folder as the public code saves it, and the model of ours that it becomes (``case["ours"]``): what it
    takes to convert is no part of a side's memory."""
    twin = twin_of(case)
    settings = twin.settings
    own = {
        "num_q": settings.queries, "dim_z": settings.latent_dim, "num_p": settings.slots, "vae_type": settings.vae_type,
        "num_latent_encoder_layers": settings.encoder_layers, "add_skip_connection": settings.skip,
        "frozen_stage": settings.stage, "add_gskip_connection": settings.gskip,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**twin.config.to_dict(), **own}, default=str))
    state = {name: value.detach().clone() for name, value in twin.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    lengths = {"max_len": case["max_response"], "max_prompt_len": case["max_prompt"]}
    load_checkpoint(folder, base_model=case["decoder"], padding="masked", **lengths).save_pretrained(case["ours"])


def noise_of(case: dict) -> dict[str, torch.Tensor]:
    """The same for both sides."""
    generator = torch.Generator().manual_seed(1)
    size = len(case["pairs"])
    return {name: torch.randn(size, LATENT, count, generator=generator) for name, count in SAMPLES.items()}


class Twin:
    """The eager twin, and torch's AdamW over what it trains."""

    def __init__(self, case: dict, form: str) -> None:
        torch.set_num_threads(case["threads"])
        self.case, self.model = case, twin_of(case)
        self.items = [lf.PromptResponse(*pair) for pair in case["pairs"]]
        self.batch = self.model.batch(self.items)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, **ADAMW)
        self.loss = torch.compile(self._loss) if form == "compiled" else self._loss

    def _loss(self) -> torch.Tensor:
        return self.model.loss(self.batch).loss

    def compare(self) -> dict:
        """Loss and norm of all gradients under given noise."""
        loss = self.model.loss(self.batch, noise_of(self.case)).loss
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        self.optimizer.zero_grad()
        return {
            "loss": float(loss), "gradient_norm": float(norm), "tokens": self.batch.input_ids.numel(),
            "loaded_bytes": peak_bytes(),
        }  # fmt: skip

    def step(self) -> dict:
        """One training step."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {}


class Ours(TrainerSide):
    """The loop's own step on the model that the twin's folder becomes."""

    def __init__(self, case: dict, precision: str) -> None:
        torch.set_num_threads(case["threads"])
        self.case = case
        self.model = lf.LMVAE.from_pretrained(case["ours"])
        items = [lf.PromptResponse(*pair) for pair in case["pairs"]]
        config = lf.TrainConfig(
            output_dir=tempfile.mkdtemp(), max_steps=10**6, batch_size=len(items), learning_rate=ADAMW["lr"],
            precision=precision, grad_clip=None, tensorboard=False, progress=False, **objective_of("DG-VAE")[1],
        )  # fmt: skip
        self.holds(Trainer(self.model, items, None, config, ()))

    def compare(self) -> dict:
        """Loss and norm of all gradients under given noise."""
        self.prepare()  # what is compared is what is timed
        data = self.trainer.train_set
        batch = self.model.make_batch(data, range(len(data)))
        out = self.model(batch, beta=1.0, eps=noise_of(self.case))
        out.loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.requires_grad and p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.model.zero_grad(set_to_none=True)
        return {
            "loss": float(out.loss), "gradient_norm": float(norm), "tokens": batch.num_tokens, "loaded_bytes": peak_bytes()
        }  # fmt: skip


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        given = json.load(file)
    ours = {"ours": "fp32", "bf16": "bf16"}.get(sys.argv[2])
    serve(Ours(given, ours) if ours else Twin(given, sys.argv[2]))
