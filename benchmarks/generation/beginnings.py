"""Cost of beginning a batch of sentences: its memory written into the cache, and a prompt read in one pass.

    python -m benchmarks.generation.beginnings [--batch 32] [--prompt 16] [--rounds 5]

Each is compared with the plain way: memory projected into a tensor of its own and copied, and the prompt read token by token,
each step with its logits.
Both sides are compared before anything is timed, then timed in turns.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.records import write
from benchmarks.generation.decode import RESULTS, prepare
from benchmarks.generation.our_side import OurSide
from lmvae_fast.models.decoder.prefill import read
from lmvae_fast.models.decoder.prepared_weights import packed_weights
from lmvae_fast.profiling.measure import machine, speedup, take_turns

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


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Elapsed and processor seconds of a call."""
    elapsed, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - elapsed, time.process_time() - processor


def measure(pair: dict[str, Callable[[], None]], rounds: int) -> dict[str, Any]:
    """Medians of elapsed and processor time, and of their ratios."""
    samples = take_turns({kind: functools.partial(timed, run) for kind, run in pair.items()}, rounds)
    elapsed, processor = ({kind: [both[i] for both in found] for kind, found in samples.items()} for i in (0, 1))
    return {
        "seconds": {kind: round(statistics.median(values), 4) for kind, values in elapsed.items()},
        "cpu_seconds": {kind: round(statistics.median(values), 4) for kind, values in processor.items()},
        "speedup": round(speedup(elapsed, "ours", "plain"), 2),
        "cpu_speedup": round(speedup(processor, "ours", "plain"), 2),
    }


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
        "batch": options.batch, "prompt": options.prompt, "machine": machine("cpu"), "rows": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        _, case = prepare(Path(folder), options.shape, options.batch, options.threads)
        for visibility, precision in CASES:
            for name, pair in sides(case, visibility, precision, options.batch, options.prompt).items():
                row = {"what": name, "visibility": visibility, "precision": precision, **measure(pair, options.rounds)}
                record["rows"].append(row)
                print(row, flush=True)
    write(record, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
