"""A training step of LlaMaVAE: ours against its eager reference, embedding and head trained.

    python -m benchmarks.training.llamavae [--shape smollm2-135m] [--batch 32] [--data FILE] [--rounds 7]

Every side is a process of its own with the same random decoder, a tiny T5 as encoder (both sides run decoders here, not
encoders), the same sentences and AdamW (torch's fused one in the reference). Before anything is timed, losses and norms of
gradients under the same noise are compared. Steps are timed in turn, in random order within each round; peak memory is each
process's own. `ours, bf16` trains under precision="bf16", all others in fp32; `by rows` is our step with
`embedding_rows_update`, for decoders whose head is a matrix of its own. Writes benchmarks/results/training/llamavae.json.
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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmvae_fast as lf
from benchmarks.common.cases import SHAPES, make_decoder_case
from benchmarks.common.records import RESULTS, write
from benchmarks.common.timing import speedups, time_request
from benchmarks.common.worker import Worker, peak_bytes, serve
from benchmarks.training.trainer_side import TrainerSide
from lmvae_fast.data import generate_corpus
from lmvae_fast.models.sentence_modules import write_modules
from lmvae_fast.profiling.measure import machine
from lmvae_fast.reference.llamavae import ReferenceLlamaVAE
from lmvae_fast.testing import tiny_encoder, tiny_tokenizer
from lmvae_fast.training.loop import Trainer

LATENT, MAX_LEN, BETA, RATE = 32, 32, 1.0, 5e-5
SPEEDUP, MEMORY = 2.0, 0.6  # what must be reached
LOSS, NORM = 1e-5, 1e-4  # the most that both may differ, relative
SIDES = ("ours", "ours, bf16", "by rows", "eager")


def noise_of(case: dict) -> torch.Tensor:
    """The same for both sides."""
    return torch.randn(len(case["sentences"]), LATENT, generator=torch.Generator().manual_seed(1))


class Reference:
    """The eager LlaMaVAE, and torch's AdamW over what it trains."""

    def __init__(self, case: dict) -> None:
        torch.set_num_threads(case["threads"])
        self.case = case
        torch.manual_seed(0)
        encoder = tiny_encoder("t5", vocab_size=len(tiny_tokenizer()))
        decoder = AutoModelForCausalLM.from_pretrained(case["decoder"])
        tokenizer = AutoTokenizer.from_pretrained(case["decoder"], add_prefix_space=True)
        self.model = ReferenceLlamaVAE(
            encoder, tiny_tokenizer(), None, decoder, tokenizer, latent_dim=LATENT, max_len=MAX_LEN
        ).eval()
        weights = load_file(case["weights"])
        with torch.no_grad():
            self.model.linear.weight.copy_(weights["posterior"])
            self.model.linear_memory.weight.copy_(weights["memory"].view_as(self.model.linear_memory.weight))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0, fused=True)

    def compare(self) -> dict:
        """Loss and norm of all gradients under given noise."""
        loss = self.model.loss(self.case["sentences"], beta=BETA, eps=noise_of(self.case)).loss
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        self.optimizer.zero_grad()
        return {"loss": float(loss), "gradient_norm": float(norm), "loaded_bytes": peak_bytes()}

    def step(self) -> dict:
        """One training step."""
        self.model.loss(self.case["sentences"], beta=BETA).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {}


class Ours(TrainerSide):
    """The loop's own step."""

    def __init__(self, case: dict, side: str) -> None:
        torch.set_num_threads(case["threads"])
        self.case = case
        config = lf.LMVAEConfig(
            system="llamavae", encoder=case["encoder"], decoder=case["decoder"], latent_dim=LATENT, max_len=MAX_LEN
        )
        self.model = lf.LMVAE(config)
        weights = load_file(case["weights"])
        with torch.no_grad():
            self.model.posterior_head.weight.copy_(weights["posterior"])
            self.model.projector.weight.copy_(weights["memory"].view_as(self.model.projector.weight))
        training = lf.TrainConfig(
            output_dir=tempfile.mkdtemp(), max_steps=10**6, batch_size=len(case["sentences"]), learning_rate=RATE,
            grad_clip=1.0, beta=BETA, beta_schedule="constant", tensorboard=False, progress=False,
            embedding_rows_update=side == "by rows",
            precision="bf16" if side == "ours, bf16" else "fp32",
        )  # fmt: skip
        self.holds(Trainer(self.model, case["sentences"], None, training, ()))

    def compare(self) -> dict:
        """Loss and norm of all gradients under given noise."""
        self.model.eval()
        data = self.trainer.train_set
        batch = self.model.make_batch(data, range(len(data)), self.trainer.pooled)
        out = self.model(batch, beta=BETA, eps=noise_of(self.case))
        out.loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.model.zero_grad(set_to_none=True)
        tokens = batch.num_tokens
        return {"loss": float(out.loss), "gradient_norm": float(norm), "tokens": tokens, "loaded_bytes": peak_bytes()}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The comparison."""
    lines = lf.read(options.data).texts if options.data else generate_corpus(4000).texts
    decoder = make_decoder_case(folder, options.shape, lines)
    encoder = folder / "encoder"
    tiny_encoder("t5", vocab_size=len(tiny_tokenizer())).save_pretrained(encoder)
    tiny_tokenizer().save_pretrained(encoder)
    write_modules(encoder, pooling="mean", normalize=True, width=24, dense=None, max_tokens=64, lower=False)
    shape = SHAPES[options.shape]
    head_dim = shape.width // shape.heads
    kv = (shape.kv_heads or shape.heads) * head_dim
    generator = torch.Generator().manual_seed(2)
    weights = {
        "posterior": torch.randn(2 * LATENT, 24, generator=generator),
        "memory": 0.1 * torch.randn(shape.layers * kv, LATENT, generator=generator),
    }
    save_file(weights, folder / "weights.safetensors")
    case = {
        "decoder": str(decoder), "encoder": str(encoder), "sentences": lines[: options.batch],
        "weights": str(folder / "weights.safetensors"), "threads": options.threads,
    }  # fmt: skip
    file = folder / "case.json"
    file.write_text(json.dumps(case))
    command = [sys.executable, "-m", "benchmarks.training.llamavae", "--case", str(file), "--side"]
    environment = {"OMP_NUM_THREADS": str(options.threads)}
    sides = [name for name in options.sides if name != "by rows" or not shape.tied]
    workers = {name: Worker([*command, name], environment, name) for name in sides}
    try:
        found = {name: worker.ask("compare") for name, worker in workers.items()}
        ours, eager = found["ours"], found["eager"]
        differences = {name: abs(ours[name] / eager[name] - 1) for name in ("loss", "gradient_norm")}
        if differences["loss"] > LOSS or differences["gradient_norm"] > NORM:
            raise SystemExit(f"the two sides disagree, nothing is timed: {differences}")
        (times,) = time_request(workers, "step", options.rounds)
        peaks = {name: worker.ask("peak")["bytes"] for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "shape": options.shape, "batch": options.batch, "tokens": ours["tokens"], "rounds": options.rounds,
        "differences": differences, "speedup": speedups(times, {name: "eager" for name in sides if name != "eager"}, 2),
        "milliseconds": {name: round(1e3 * statistics.median(values), 1) for name, values in times.items()},
        "peak_bytes": peaks, "loaded_bytes": {name: row["loaded_bytes"] for name, row in found.items()},
        "floor": {"speedup": SPEEDUP, "peak_memory": MEMORY},
    }  # fmt: skip


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--data", help="sentences; default: the bundled corpus")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "training" / "llamavae.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        warnings.filterwarnings("ignore")
        case = json.loads(Path(options.case).read_text())
        serve(Reference(case) if options.side == "eager" else Ours(case, options.side))
        return 0
    torch.set_num_threads(options.threads)
    command = f"python -m benchmarks.training.llamavae {shlex.join(sys.argv[1:])}".strip()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options, Path(folder))
    write({"command": command, "machine": machine("cpu"), "results": [row]}, options.output)
    for name, value in row["milliseconds"].items():
        share = row["peak_bytes"][name] / row["peak_bytes"]["eager"]
        print(
            f"{name:>8}: {value:9.1f} ms  {share:.0%} of the reference's memory  {row['speedup'].get(name, 1.0):.2f}x"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
