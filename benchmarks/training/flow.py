"""Fitting a flow, the whole loop: ours against FrEIA with torch's fused AdamW, from the same numbers on the same batches.

    python -m benchmarks.training.flow [--dims 32 128] [--batch 256] [--blocks 10 ...] [--hidden 512] [--steps 20] [--rounds 12]

A step is: take a batch, run the flow, the NLL under the pairs' posteriors, backward, clip, AdamW. Both sides take `steps` of
them a round, in turn; times are per step. Ours is the loop's own step (`FlowTrainer.optimizer_step`), with what it watches and
counts; FrEIA's is the same written out. Losses of the two are compared after every round: they must be one run.
Writes benchmarks/results/training/flow.json.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.records import RESULTS, write
from benchmarks.common.timing import medians, speedups
from lmvae_fast.config import FlowConfig, FlowTrainConfig
from lmvae_fast.integrations.freia import convert
from lmvae_fast.models.systems.invertible_cvae import BaseDensity, FlowPairs, InvertibleCVAE
from lmvae_fast.optional import require
from lmvae_fast.profiling.measure import machine, take_turns
from lmvae_fast.testing import make_model
from lmvae_fast.training.flow_loop import FlowTrainer

PAIRS = 8192
#: FrEIA's blocks by our names; both are clamped at 2.
KINDS = {"allinone": "AllInOneBlock", "glow": "GLOWCouplingBlock"}


def pairs_of(dim: int) -> FlowPairs:
    """Vectors whose posteriors depend on them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PAIRS, dim, generator=generator)
    mu = torch.tanh(x @ torch.randn(dim, dim, generator=generator) / dim**0.5)
    return FlowPairs(x, BaseDensity.gaussian(mu, torch.full_like(mu, -1.0)))


class FreiaSide:
    """FrEIA's flow and torch's AdamW(fused=True) in the loop's step, written out."""

    def __init__(self, inn: nn.Module, pairs: FlowPairs, config: FlowTrainConfig):
        self.inn, self.pairs, self.clip = inn, pairs, config.grad_clip
        self.parameters = [parameter for parameter in inn.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=config.adam_betas, eps=config.adam_eps,
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        self.loss = 0.0

    def optimizer_step(self, rows: Tensor) -> None:
        """One step on these pairs."""
        z, logdet = self.inn(self.pairs.vectors[rows])
        loss = self.pairs.base.select(rows).nll(z, logdet).mean()
        loss.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = float(loss.detach())


class OurSide:
    """The loop's own step, on a flow of FrEIA's numbers."""

    def __init__(self, inn: nn.Module, pairs: FlowPairs, config: FlowTrainConfig, kind: str):
        dim = pairs.vectors.shape[1]
        vae = make_model(latent_dim=dim)
        model = InvertibleCVAE(vae, convert(inn), FlowConfig(kind=kind, bridge="none"))
        self.trainer = FlowTrainer(model, pairs, None, config)
        self.optimizer_step = self.trainer.optimizer_step

    @property
    def loss(self) -> float:
        """Of the last step."""
        before, self._before = getattr(self, "_before", (0.0, 0.0)), (
            float(self.trainer.sums[0]), float(self.trainer.window["pairs"]),
        )  # fmt: skip
        return (self._before[0] - before[0]) / max(self._before[1] - before[1], 1.0)


def freia_flow(kind: str, dim: int, blocks: int, hidden: int) -> nn.Module:
    """`blocks` of FrEIA's; GLOW followed by ActNorm and a permutation, as ours is."""
    frame = require("FrEIA.framework", purpose="this comparison", extra="bench")
    modules = require("FrEIA.modules", purpose="this comparison", extra="bench")

    def subnet(fan_in: int, fan_out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(fan_in, hidden), nn.ReLU(), nn.Linear(hidden, fan_out))

    inn = frame.SequenceINN(dim)
    for block in range(blocks):
        inn.append(getattr(modules, KINDS[kind]), subnet_constructor=subnet)
        if kind == "glow":
            inn.append(modules.ActNorm)
            inn.append(modules.PermuteRandom, seed=block)
    for module in inn.module_list:
        if hasattr(module, "init_on_next_batch"):
            module.init_on_next_batch = False
    return inn


def timed(side: Any, batches: list[Tensor]) -> float:
    """Seconds per step over these batches."""
    start = time.perf_counter()
    for rows in batches:
        side.optimizer_step(rows)
    return (time.perf_counter() - start) / len(batches)


def measure(kind: str, dim: int, blocks: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One comparison: medians, and the speed-up within rounds."""
    torch.manual_seed(0)
    inn = freia_flow(kind, dim, blocks, options.hidden)
    pairs = pairs_of(dim)
    config = FlowTrainConfig(
        output_dir=str(folder / f"{kind}-{dim}-{blocks}"), batch_size=options.batch, max_steps=10**6, initialize=False,
        tensorboard=False, progress=False,
    )  # fmt: skip
    ours, theirs = OurSide(inn, pairs, config, kind), FreiaSide(inn, pairs, config)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, PAIRS, (options.batch,), generator=generator) for _ in range(options.steps)]
    first = batches[:1]
    with ours.trainer.prepared():  # as in a run; that freed memory stays with the process serves both sides
        for side in (ours, theirs):  # both take this step, so that the runs stay one
            timed(side, first)
        difference = abs(ours.loss - theirs.loss) / max(abs(theirs.loss), 1e-9)
        if not difference < 1e-4:
            raise SystemExit(f"{kind}, dim {dim}: the two sides' losses differ by {difference:.1e} of their size")
        sides = {"ours": functools.partial(timed, ours, batches), "FrEIA": functools.partial(timed, theirs, batches)}
        times = take_turns(sides, options.rounds, discarded=1)
    return {
        "kind": kind, "dim": dim, "batch": options.batch, "blocks": blocks, "hidden": options.hidden,
        "seconds_per_step": medians(times, 6), "speedup": speedups(times, {"ours": "FrEIA"})["ours"],
        "loss_difference": difference, "rounds": options.rounds, "steps": options.steps,
    }  # fmt: skip


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--blocks", type=int, nargs="+", default=[10])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="per side and round")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "training" / "flow.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        cases = itertools.product(options.kinds, options.dims, options.blocks)
        results = [measure(*case, options, Path(folder)) for case in cases]
    record = {
        "command": f"python -m benchmarks.training.flow {' '.join(sys.argv[1:])}".strip(),
        "machine": machine("cpu"),
    }
    write({**record, "results": results}, options.output)
    for result in results:
        case = f"{result['kind']:>9} dim {result['dim']:>3}, {result['blocks']:>2} blocks"
        print(f"{case}: {result['speedup']:.2f}x of FrEIA + AdamW(fused)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
