"""Sides that run in this package's own process: an integration's example, `before` without this package's code, and `after`.

usage: python -m benchmarks.integrations.our_sides CASE.json INTEGRATION before|after

Where the framework holds no model of this kind by itself (Trainer, Lightning), `before` is the same model and script with every
op in plain torch, `lf.backend("reference")`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lmvae_fast as lf
from benchmarks.common.worker import serve
from lmvae_fast.integrations.langvae import load_checkpoint
from lmvae_fast.optional import require

warnings.filterwarnings("ignore")


class Side(ABC):
    """What every side has: its case, and whether it runs this package's code."""

    def __init__(self, case: dict, after: bool) -> None:
        torch.set_num_threads(case["threads"])
        self.case, self.after = case, after
        self.setup()

    @abstractmethod
    def setup(self) -> None:
        """Build what the example needs."""

    def backend(self) -> contextlib.AbstractContextManager:
        """The backend that ``before`` and ``after`` run on."""
        return contextlib.nullcontext() if self.after else lf.backend("reference")

    def model(self) -> lf.LMVAE:
        """The case's model, trained by teacher forcing."""
        return load_checkpoint(self.case["checkpoint"], objective="elbo", kl_target=self.case["target_kl"])

    def loss(self, model: lf.LMVAE) -> dict:
        """Loss and gradient norm of one step without dropout, at a fixed seed."""
        with self.backend():
            out = model.eval()(self.case["sentences"], beta=0.5, seed=3)
            out.loss.backward()
        norm = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
        model.zero_grad(set_to_none=True)
        return {"numbers": [out.loss.item(), norm]}


class FrEIA(Side):
    """FrEIA's quick start: two half moons by eight AllInOneBlocks with subnets of 512, batches of 100, Adam."""

    STEPS, DRAWS = 20, 50

    def setup(self) -> None:
        place = "lmvae_fast.integrations.freia" if self.after else "FrEIA"
        framework, modules = (
            require(f"{place}.{name}", purpose="FrEIA's example", extra="bench") for name in ("framework", "modules")
        )
        datasets = require("sklearn.datasets", purpose="FrEIA's example", extra="train")
        numpy = require("numpy", purpose="FrEIA's example")
        torch.manual_seed(0)
        numpy.random.seed(0)

        def subnet(dims_in: int, dims_out: int) -> nn.Module:
            return nn.Sequential(nn.Linear(dims_in, 512), nn.ReLU(), nn.Linear(512, dims_out))

        self.inn = framework.SequenceINN(2)
        for _ in range(8):
            self.inn.append(modules.AllInOneBlock, subnet_constructor=subnet, permute_soft=True)
        self.optimizer = torch.optim.Adam(self.inn.parameters(), lr=0.001)
        self.data = torch.Tensor(datasets.make_moons(n_samples=100, noise=0.05, random_state=0)[0])
        self.noise = torch.randn(100, 2)

    def _step(self) -> float:
        self.optimizer.zero_grad()
        z, log_jac_det = self.inn(self.data)
        loss = (0.5 * torch.sum(z**2, 1) - log_jac_det).mean() / 2
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def check(self) -> dict:
        """Losses of ten steps."""
        return {"numbers": [self._step() for _ in range(10)]}

    def train(self) -> dict:
        """Seconds of a step."""
        return self._each(self.STEPS, self._step)

    @torch.no_grad()
    def sample(self) -> dict:
        """Seconds of drawing 100 points."""
        return self._each(self.DRAWS, lambda: self.inn(self.noise, rev=True))

    @staticmethod
    def _each(count: int, function: Callable[[], Any]) -> dict:
        start = time.perf_counter()
        for _ in range(count):
            function()
        return {"each_seconds": (time.perf_counter() - start) / count}


class HuggingFace(Side):
    """transformers' Trainer on a `PretrainedLMVAE`."""

    def setup(self) -> None:
        self.hub = require("lmvae_fast.integrations.hub", purpose="Trainer")
        self.wrapped = self.hub.PretrainedLMVAE.of(self.model())
        lmvae = self.wrapped.lmvae
        ids = self.hub.tokenize_columns(lmvae)({"text": self.case["data"]})["input_ids"]
        self.rows = [{"input_ids": row} for row in ids]

    def check(self) -> dict:
        """See `loss`."""
        return self.loss(self.wrapped.lmvae)

    def train(self) -> dict:
        """Seconds of a step, the Trainer's own work included."""
        from transformers import Trainer, TrainingArguments

        steps = self.case["steps"]
        with tempfile.TemporaryDirectory() as folder, self.backend():
            arguments = TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=self.case["batch"], report_to=[],
                disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no",
            )  # fmt: skip
            trainer = Trainer(
                self.wrapped, arguments, train_dataset=self.rows, data_collator=self.hub.Collator(self.wrapped.lmvae)
            )
            start = time.perf_counter()
            trainer.train()
            return {"each_seconds": (time.perf_counter() - start) / steps}


class Lightning(Side):
    """The module of examples/lightning_module.py under Lightning's Trainer."""

    def setup(self) -> None:
        lightning = require("lightning", purpose="this example", package="lightning")
        self.lightning = lightning
        lmvae, rate = self.model(), self.case["learning_rate"]

        class SentenceVAE(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = lmvae

            def training_step(self, batch: Any, index: int) -> torch.Tensor:
                return self.model(batch, beta=0.5).loss

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=rate)

        self.module = SentenceVAE()
        data, size = lmvae.tokenize(self.case["data"]), self.case["batch"]
        pooled = lmvae.pool(data)
        spans = (range(i, min(i + size, len(data))) for i in range(0, len(data), size))
        self.batches = [lmvae.make_batch(data, span, pooled) for span in spans]

    def check(self) -> dict:
        """See `loss`."""
        return self.loss(self.module.model)

    def train(self) -> dict:
        """Seconds of a step, Lightning's own work included."""
        steps = self.case["steps"]
        with tempfile.TemporaryDirectory() as folder, self.backend():
            trainer = self.lightning.Trainer(
                max_steps=steps, logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=folder,
                enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            loader = torch.utils.data.DataLoader(self.batches, batch_size=None, shuffle=True)
            start = time.perf_counter()
            trainer.fit(self.module, loader)
            return {"each_seconds": (time.perf_counter() - start) / steps}


class SentenceTransformers(Side):
    """`encode` of a SentenceTransformer: the encoder by itself with its pooling, and the posterior means of a model on it."""

    def setup(self) -> None:
        transformers = require("sentence_transformers", purpose="this example", extra="sentence-transformers")
        model = self.model()
        self.head = model.posterior_head.weight.detach().chunk(2)[0]
        if self.after:
            ours = require("lmvae_fast.integrations.sentence_transformers", purpose="this example")
            modules = [ours.PosteriorMean(model)]
        else:
            parts = require("sentence_transformers.sentence_transformer.modules", purpose="this example")
            encoder = str(Path(self.case["checkpoint"]).parent / "encoder")
            body = parts.Transformer(encoder)
            modules = [body, parts.Pooling(body.get_embedding_dimension(), pooling_mode="mean")]
        self.transformer = transformers.SentenceTransformer(modules=modules, device="cpu")

    def check(self) -> dict:
        """Posterior means, which are a linear map of the plain embeddings."""
        got = self.transformer.encode(self.case["data"][:8], convert_to_tensor=True)
        return {"numbers": (got if self.after else got @ self.head.t()).flatten().tolist()}

    def encode(self) -> dict:
        """Every sentence of the case."""
        self.transformer.encode(self.case["data"], batch_size=self.case["batch"], show_progress_bar=False)
        return {}


class Pythae(Side):
    """pythae's NormalSampler on `as_pythae(model)`."""

    def setup(self) -> None:
        self.ours = require("lmvae_fast.integrations.pythae", purpose="this example", extra="pythae")
        self.samplers = require("pythae.samplers", purpose="this example", extra="pythae")
        self.wrapped = self.ours.as_pythae(load_checkpoint(self.case["checkpoint"])).eval()

    def _draw(self, count: int) -> torch.Tensor:
        return self.samplers.NormalSampler(self.wrapped).sample(num_samples=count, batch_size=self.case["latents"])

    def check(self) -> dict:
        """Token ids of some draws."""
        torch.manual_seed(0)
        return {"ids": self._draw(8).tolist()}

    def sample(self) -> dict:
        """As many draws as the case says."""
        self._draw(self.case["latents"])
        return {}


SIDES: dict[str, type[Side]] = {
    "freia": FrEIA, "huggingface": HuggingFace, "lightning": Lightning, "pythae": Pythae,
    "sentence-transformers": SentenceTransformers,
}  # fmt: skip

if __name__ == "__main__":
    path, name, which = sys.argv[1:]
    serve(SIDES[name](json.loads(Path(path).read_text()), which == "after"))
