"""Growth of a training step with batch, sentence length, latent and layers, and its spread over processes.

    python -m benchmarks.training.bench_scaling        # writes benchmarks/results/training/scaling.json

A GPT-2 of 256 wide, 4 heads and 8,000 tokens under a LangVAE (random weights: speed does not depend on them); one size is
varied at a time around batch 32, 16 tokens a sentence, a latent of 128 and 4 layers. Processes share one batch and one
machine, each with one thread.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from benchmarks.common.records import RESULTS, write
from lmvae_fast.config import LMVAEConfig, TrainConfig
from lmvae_fast.data import generate_corpus
from lmvae_fast.profiling.measure import call_seconds, interleave, machine, peak_memory, take_turns
from lmvae_fast.profiling.presets import assembled
from lmvae_fast.profiling.step import TrainingStep

BASE = {"batch": 32, "length": 16, "latent": 128, "layers": 4}
AXES = {
    "batch": (1, 4, 16, 32, 64, 256), "length": (8, 16, 32, 128, 512), "latent": (32, 128, 512, 1024),
    "layers": (2, 4, 8, 16, 32),
}  # fmt: skip
WIDTH, VOCABULARY = 256, 8000
TRAIN = TrainConfig(learning_rate=1e-5, beta_schedule="constant", max_steps=10**6)


def build(size: dict[str, int]) -> tuple[Any, list[str]]:
    """A model, and exactly one batch of sentences, each cut to the length asked for."""
    words = " ".join(generate_corpus(3000, seed=0).texts).split()
    length = size["length"]
    starts = [(i * length) % (len(words) - length) for i in range(size["batch"])]
    texts = [" ".join(words[start : start + length]) for start in starts]
    torch.manual_seed(0)
    encoder = BertModel(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
            max_position_embeddings=1024,
        )
    )  # fmt: skip
    decoder = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_layer=size["layers"], n_embd=WIDTH, n_head=4, n_positions=1100, bos_token_id=0,
            eos_token_id=0,
        )
    )  # fmt: skip
    config = LMVAEConfig(latent_dim=size["latent"], max_len=length, projector_dropout=0.0)
    return assembled(encoder.eval(), decoder.eval(), config, texts), texts


def measure(size: dict[str, int], seconds: float) -> dict[str, Any]:
    """Step time and memory of one size."""
    model, texts = build(size)
    with TrainingStep(model, texts, TRAIN.replace(batch_size=size["batch"])) as step:
        times = interleave({"step": step}, seconds, "cpu", rounds=3)["step"]
        tokens = step.batch().num_tokens
        median = statistics.median(times)
        return {
            **size, "tokens": tokens, "seconds": median, "tokens_per_s": tokens / median, "rounds": len(times),
            "held_bytes": step.held_bytes(), "extra_bytes": peak_memory(step, "cpu"),
        }  # fmt: skip


def _rank(rank: int, world: int, folder: str, rounds: int) -> None:
    """One process of a run of ``world``: rank 0 leaves its times in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model, texts = build(BASE)
    with TrainingStep(model, texts, TRAIN.replace(batch_size=BASE["batch"]), Path(folder) / "run") as step:
        # a fixed number of steps: every process must take as many
        times = take_turns({"step": functools.partial(call_seconds, step)}, rounds, discarded=2)["step"]
        tokens = step.batch().num_tokens  # of the whole batch
    if rank == 0:
        (Path(folder) / "times.json").write_text(json.dumps({"times": times, "tokens": tokens}))
    dist.destroy_process_group()


def processes(world: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of ``world`` processes that share the base batch."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (world, folder, rounds), world)
        measured = json.loads((Path(folder) / "times.json").read_text())
    median = statistics.median(measured["times"])
    rate = measured["tokens"] / median
    return {"processes": world, "seconds": median, "tokens_per_s": rate, "tokens_per_s_per_process": rate / world}


def exchanged() -> dict[str, int]:
    """Bytes that a step's exchange of the projector's gradient brings to a process: as factors, and if it were dW itself."""
    rows = BASE["layers"] * 2 * WIDTH * BASE["length"]
    return {"factors": 4 * BASE["batch"] * (rows + BASE["latent"]), "gradient": 4 * rows * BASE["latent"]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="of timing, per size")
    parser.add_argument("--axes", nargs="*", default=list(AXES), choices=list(AXES))
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=RESULTS / "training" / "scaling.json")
    options = parser.parse_args()
    record: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.training.bench_scaling", *sys.argv[1:]]),
        "machine": machine("cpu"), "base": BASE, "sizes": {},
    }  # fmt: skip
    for axis in options.axes:
        record["sizes"][axis] = []
        for value in AXES[axis]:
            row = measure({**BASE, axis: value}, options.seconds)
            record["sizes"][axis].append(row)
            print(f"{axis} {value}: {row['seconds'] * 1e3:.1f} ms, {row['tokens_per_s']:,.0f} tokens/s")
    record["processes"] = [processes(world, 12) for world in options.processes]
    record["exchanged_bytes"] = exchanged()
    for row in record["processes"]:
        print(f"{row['processes']} processes: {row['tokens_per_s']:,.0f} tokens/s")
    write(record, options.output)


if __name__ == "__main__":
    main()
