"""What beginning a batch of sentences costs: its memory written into the cache, and a prompt read in one pass.

    python -m benchmarks.generation.beginnings [--batch 32] [--prompt 16] [--rounds 5]

Beside each, what it stands for: memory projected into a tensor of its own and copied, and the prompt read token by token,
each step with its logits.
Both sides are compared before anything is timed, then timed in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.generation.decode import RESULTS, prepare
from benchmarks.generation.our_side import OurSide
from benchmarks.kernels import harness
from lmvae_fast.models.decoder.prefill import read
from lmvae_fast.models.decoder.prepared_weights import packed_weights

CASES = (("rolling", "fp32"), ("prefix", "fp32"), ("prefix", "bf16"))


@torch.no_grad()
def sides(case: dict, visibility: str, precision: str, batch: int, prompt: int) -> dict[str, dict[str, Callable]]:
    """Ours and the plain way of both pieces of work, found to leave the same in the cache."""
    side = OurSide(case, precision, "engine", visibility)
    model, z = side.model, side.z[:batch]
    decoder, rows = model.decoder, torch.arange(batch)
    injection = model.inject(z)
    ours, plain = (decoder.new_cache(injection, batch=batch, max_tokens=prompt + 1) for _ in range(2))
    ids = torch.randint(5, 2000, (batch, prompt), generator=torch.Generator().manual_seed(0))

    def straight() -> None:
        model.inject(z, out=ours.memory)

    def copied() -> None:
        plain.place(rows, model.inject(z))

    def at_once() -> None:
        ours.restart(rows)
        read(decoder, ours, injection, range(batch), ids.tolist())

    def by_steps() -> None:
        plain.restart(rows)
        for token in ids.T:
            decoder.step(token, plain, injection)

    work = {"memory": {"ours": straight, "plain": copied}, "prompt": {"ours": at_once, "plain": by_steps}}
    for name, pair in work.items():
        with packed_weights(decoder, batch):
            for run in pair.values():
                run()
        tolerance = 0.0 if name == "memory" else 1e-4 if precision == "fp32" else 0.1
        error = (ours.kv - plain.kv).float().norm() / plain.kv.float().norm()
        if not error <= tolerance:
            raise SystemExit(f"{name}: the caches differ by {error:.1e} of their norm: nothing is timed")

    def under(run: Callable[[], None]) -> Callable[[], None]:
        @torch.no_grad()
        def timed() -> None:
            with packed_weights(decoder, batch):
                run()

        return timed

    return {name: {kind: under(run) for kind, run in pair.items()} for name, pair in work.items()}


def measure(pair: dict[str, Callable], rounds: int) -> dict[str, Any]:
    """Medians of elapsed and processor time, and of their ratios."""
    seconds: dict[str, list[float]] = {kind: [] for kind in pair}
    processor: dict[str, list[float]] = {kind: [] for kind in pair}
    for _ in range(rounds):
        for kind, run in pair.items():
            elapsed, cpu = time.perf_counter(), time.process_time()
            run()
            seconds[kind].append(time.perf_counter() - elapsed)
            processor[kind].append(time.process_time() - cpu)

    def ratio(times: dict[str, list[float]]) -> float:
        return round(statistics.median(b / a for a, b in zip(times["ours"], times["plain"], strict=True)), 2)

    return {
        "seconds": {kind: round(statistics.median(values), 4) for kind, values in seconds.items()},
        "cpu_seconds": {kind: round(statistics.median(values), 4) for kind, values in processor.items()},
        "speedup": ratio(seconds), "cpu_speedup": ratio(processor),
    }  # fmt: skip


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gpt2-small")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=16, help="tokens read before the first that is produced")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "beginnings.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.generation.beginnings", *sys.argv[1:]]), "shape": options.shape,
        "batch": options.batch, "prompt": options.prompt, "machine": harness.machine("cpu"), "rows": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        _, case = prepare(Path(folder), options.shape, options.batch, options.threads)
        for visibility, precision in CASES:
            for name, pair in sides(case, visibility, precision, options.batch, options.prompt).items():
                row = {"what": name, "visibility": visibility, "precision": precision, **measure(pair, options.rounds)}
                record["rows"].append(row)
                print(row, flush=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
