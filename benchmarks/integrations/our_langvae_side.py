"""The same script as `langvae_side.py`, run on this package by `install()`; `elbo` gives the model its own objective.

usage: python -m benchmarks.integrations.our_langvae_side CASE.json released|elbo
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

import benchmarks.common
from benchmarks.common.worker import serve
from lmvae_fast.integrations import langvae
from lmvae_fast.models import latents


def without_noise(model: Any) -> None:
    """As LangVAE's side has it: every draw is the posterior's mean, and nothing is dropped."""
    drawn = latents.sample_with_kl

    def mean(posterior: Any, **options: Any) -> Any:
        return drawn(posterior, **{**options, "eps": torch.zeros_like(posterior.mu)})

    latents.sample_with_kl = mean
    model.decoder.projector.dropout = 0.0


def main() -> None:
    """Command line."""
    file, objective = sys.argv[1:]
    langvae.install()
    sys.path.append(str(Path(benchmarks.common.__file__).parent))
    script = runpy.run_path(str(Path(__file__).with_name("langvae_side.py")))
    side_class = script["LangVAESide"]
    side_class.check.__globals__["without_noise"] = without_noise
    if objective == "elbo":

        def load(side: Any) -> langvae.LangVAE:
            options = {"objective": "elbo", "free_running": False, "kl_target": side.case["target_kl"]}
            return langvae.LangVAE.from_lmvae(langvae.load_checkpoint(side.case["checkpoint"], **options))

        side_class.load = load
    side = side_class(json.loads(Path(file).read_text()))
    checked = side.check

    def check() -> dict:
        drawn = latents.sample_with_kl
        try:
            return checked()
        finally:
            latents.sample_with_kl = drawn

    side.check = check
    serve(side)


if __name__ == "__main__":
    main()
