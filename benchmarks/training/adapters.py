"""A training step of our own preset (`system="lmvae"`, a decoder with low-rank adapters): prepared layers against modules.

    python -m benchmarks.training.adapters [--shape smollm2-135m] [--batch 32] [--data FILE] [--rounds 7]

Every side is a process of its own with the same random parts and sentences. Before anything is timed, loss and norm of all
gradients under the same noise are compared; adapters are drawn, so that they do something. Steps are timed in turn, in
random order within each round; peak memory is each process's own. Writes benchmarks/results/training/adapters.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import lmvae_fast as lf
from benchmarks.common.cases import MAX_LEN, SHAPES, make_case
from benchmarks.common.records import RESULTS, write
from benchmarks.common.timing import speedups, time_request
from benchmarks.common.worker import Worker, peak_bytes, serve
from benchmarks.training.trainer_side import TrainerSide
from lmvae_fast.data import generate_corpus
from lmvae_fast.models.decoder.training_body import TrainingBody, trained_through
from lmvae_fast.profiling.measure import machine
from lmvae_fast.training.loop import Trainer

LATENT, RANK = 128, 16
SIDES = {"modules fp32": (False, "fp32"), "prepared layers fp32": (True, "fp32"),
         "modules bf16": (False, "bf16"), "prepared layers bf16": (True, "bf16")}  # fmt: skip
DIFFERENCE = 1e-4  # the most that sides in fp32 may differ, relative


class Side(TrainerSide):
    """The loop's own step; without prepared layers, the decoder's body is left as it is."""

    def __init__(self, case: dict, prepared: bool, precision: str) -> None:
        torch.set_num_threads(case["threads"])
        self.case, self.prepared = case, prepared
        torch.manual_seed(0)
        folder = Path(case["checkpoint"]).parent
        config = lf.LMVAEConfig(
            system="lmvae", encoder=str(folder / "encoder"), decoder=str(folder / "decoder"), latent_dim=LATENT,
            max_len=MAX_LEN, lora_rank=RANK, posterior_init="random", encoder_layer=None,
        )  # fmt: skip
        self.model = lf.LMVAE(config)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.02)
        training = lf.TrainConfig(
            output_dir=tempfile.mkdtemp(), max_steps=10**6, batch_size=len(case["sentences"]), precision=precision,
            learning_rate=1e-3, tensorboard=False, progress=False,
        )  # fmt: skip
        self.holds(Trainer(self.model, case["sentences"], None, training, ()))
        if not prepared:
            TrainingBody._serves = lambda self, options: False  # type: ignore[method-assign]

    def compare(self) -> dict:
        """Loss and norm of all gradients under given noise."""
        data = self.trainer.train_set
        batch = self.model.make_batch(data, range(len(data)), self.trainer.pooled)
        noise = torch.randn(len(data), LATENT, generator=torch.Generator().manual_seed(1))
        bf16 = self.trainer.config.precision == "bf16"
        with trained_through(self.model.decoder, self.prepared), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = self.model(batch, beta=0.1, eps=noise).loss
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.model.zero_grad(set_to_none=True)
        return {"loss": float(loss), "gradient_norm": float(norm), "tokens": batch.num_tokens, "loaded": peak_bytes()}

    def layers(self) -> dict:
        """What the decoder's layers are, once a step was taken."""
        return {"layers": "modules" if self.trainer.body is None else self.trainer.body.runs}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The comparison."""
    lines = lf.read(options.data).texts if options.data else generate_corpus(4000).texts
    file = make_case(folder, options.shape, lines, options.batch, options.threads)
    command = [sys.executable, "-m", "benchmarks.training.adapters", "--case", str(file), "--side"]
    environment = {"OMP_NUM_THREADS": str(options.threads)}
    workers = {name: Worker([*command, name], environment, name) for name in SIDES}
    try:
        found = {name: worker.ask("compare") for name, worker in workers.items()}
        one, two = found["prepared layers fp32"], found["modules fp32"]
        differences = {name: abs(one[name] / two[name] - 1) for name in ("loss", "gradient_norm")}
        if max(differences.values()) > DIFFERENCE:
            raise SystemExit(f"the two sides disagree, nothing is timed: {differences}")
        (times,) = time_request(workers, "step", options.rounds)
        peaks = {name: worker.ask("peak")["bytes"] for name, worker in workers.items()}
        layers = {name: worker.ask("layers")["layers"] for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    baselines = {f"prepared layers {precision}": f"modules {precision}" for precision in ("fp32", "bf16")}
    return {
        "shape": options.shape, "batch": options.batch, "rank": RANK, "tokens": one["tokens"], "rounds": options.rounds,
        "differences": differences, "speedup": speedups(times, baselines, 2), "layers": layers,
        "milliseconds": {name: round(1e3 * statistics.median(values), 1) for name, values in times.items()},
        "peak_bytes": peaks,
    }  # fmt: skip


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--data", help="sentences; default: the bundled corpus")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "training" / "adapters.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        warnings.filterwarnings("ignore")
        serve(Side(json.loads(Path(options.case).read_text()), *SIDES[options.side]))
        return 0
    torch.set_num_threads(options.threads)
    command = f"python -m benchmarks.training.adapters {shlex.join(sys.argv[1:])}".strip()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options, Path(folder))
    write({"command": command, "machine": machine("cpu"), "results": [row]}, options.output)
    for name, value in row["milliseconds"].items():
        print(
            f"{name:>22}: {value:9.1f} ms  {row['peak_bytes'][name] / 1e9:5.2f} GB  {row['speedup'].get(name, 1.0):.2f}x"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
