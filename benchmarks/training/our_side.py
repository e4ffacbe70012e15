"""Our side of a comparison: the steps of `lmvae_fast.training`, in one configuration.

usage: python -m benchmarks.training.our_side CASE.json free-running|teacher-forced fp32|bf16 [plain|compiled|body]

`plain` is the same model with every op in plain torch and torch's AdamW over everything (the eager reference: one
parallel pass of Hugging Face's modules); `compiled` is that under torch.compile. `body` is our step with
`TrainConfig.compile`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import warnings
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import lmvae_fast as lf
from benchmarks.common.worker import serve
from lmvae_fast.integrations.langvae import load_checkpoint
from lmvae_fast.models.decoder.training_body import trained_through
from lmvae_fast.training.loop import Trainer
from lmvae_fast.training.step_setup import compiling

warnings.filterwarnings("ignore")


class OurSide:
    """A model loaded from LangVAE's checkpoint folder, and a trainer around one batch."""

    def __init__(self, case: dict, mode: str, precision: str, form: str = "fast", **options: Any) -> None:
        torch.set_num_threads(case["threads"])
        self.case, self.held = case, contextlib.ExitStack()
        free = mode == "free-running"
        # Free running is compared exactly, so with the released loss.
        objective = "langvae-0.6" if free else "elbo"
        self.model = load_checkpoint(
            case["checkpoint"], objective=objective, free_running=free, kl_target=case["target_kl"]
        )
        if form == "body":  # as the trainer does, but for the comparison of gradients, too
            self.held.enter_context(compiling(self.model.decoder, True))
        elif form != "fast":
            self.held.enter_context(lf.backend("reference"))
        if form == "compiled":
            # Every layer is a recompilation to the compiler, whose default limit is eight.
            torch._dynamo.config.recompile_limit = 128
            self.model.forward = torch.compile(self.model.forward, dynamic=True)  # type: ignore[method-assign]
        config = lf.TrainConfig(
            output_dir=tempfile.mkdtemp(), max_steps=10**6, batch_size=len(case["sentences"]), precision=precision,
            learning_rate=case["learning_rate"], grad_clip=None, beta=case["beta"], beta_schedule="constant",
            tensorboard=False, progress=False, fused_projector_update=form in ("fast", "body"), **options,
        )  # fmt: skip
        self.trainer = Trainer(self.model, case["sentences"], None, config, ())
        self.rows = self.trainer._batches(0)
        self.stepping, self.fast = False, form == "fast"

    def gradients(self, file: str) -> dict:
        """Loss without dropout under given noise; gradients into a file, by LangVAE's names."""
        self.model.eval()
        data = self.trainer.train_set
        batch = self.model.make_batch(data, range(len(data)), self.trainer.pooled)
        with trained_through(self.model.decoder, self.fast):  # as in a step
            out = self.model(batch, beta=self.case["beta"], eps=load_file(self.case["noise"])["eps"])
            out.loss.backward()
        projector = self.model.projector
        named: dict[str, Any] = {"encoder.linear.weight": self.model.posterior_head.weight.grad}
        for layer in range(projector.weight.shape[0]):
            named[f"decoder.context_hidden.{layer}.weight"] = projector.weight.grad[layer]
            named[f"decoder.context_hidden.{layer}.bias"] = projector.bias.grad[layer]
        save_file({name: gradient.contiguous() for name, gradient in named.items()}, file)
        self.model.zero_grad(set_to_none=True)
        return {"loss": out.loss.item()}

    def layers(self) -> dict:
        """What the decoder's layers are, once a step was taken: prepared, or its modules and why."""
        body = self.trainer.body
        return {"layers": "modules" if body is None else body.runs}

    def step(self) -> dict:
        """One training step."""
        if not self.stepping:
            self.held.enter_context(self.trainer.prepared())
            self.stepping = True
        self.trainer.optimizer_step(self.rows)
        return {}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        serve(OurSide(json.load(file), *sys.argv[2:]))
