"""Training steps and decoding of two commits in turn, in one run: whether a change made anything slower.

    python -m benchmarks.commits OTHER_CHECKOUT [--shape gpt2-small] [--batches 8 32] [--rounds 7] [--other-first]
        [--output FILE]

OTHER_CHECKOUT is a clone at the other commit in which `make setup` was run; each side runs by its own folder's `.venv`, with
its own extension. Both sides get the same case (weights, sentences, noise, latents). Before anything is timed the losses and
gradients must agree to 1e-5 and the decoded ids must be the same. Times are taken in turn, in random order within each
round; `ratio` is the median over rounds of the other commit's time by this one's, so below 1 means slower than it was;
`spread` its quartiles, of elapsed time. `--other-first` starts the other commit's process first: the one that starts first may
get better pages of memory for its weights. Writes benchmarks/results/commits.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import records
from benchmarks.common.cases import SHAPES, make_case
from benchmarks.common.timing import medians, time_request
from benchmarks.common.worker import Worker
from benchmarks.generation.decode import prepare
from benchmarks.training.steps import GRADIENTS, gradient_differences
from lmvae_fast.data.corpus import generate_corpus
from lmvae_fast.profiling.measure import machine

#: Work by name: the module that does it and its arguments behind the case's file, the request that is timed.
WORK = {
    "training step, teacher forcing, fp32": ("benchmarks.training.our_side", ("teacher-forced", "fp32"), "step"),
    "training step, teacher forcing, bf16": ("benchmarks.training.our_side", ("teacher-forced", "bf16"), "step"),
    "training step, free running, fp32": ("benchmarks.training.our_side", ("free-running", "fp32"), "step"),
    "decoding, fp32": ("benchmarks.generation.our_side", ("fp32", "engine"), "decode"),
    "decoding, bf16": ("benchmarks.generation.our_side", ("bf16", "engine"), "decode"),
}


def commit_of(folder: Path) -> str:
    """The commit a checkout is at, or "" where the folder is none."""
    asked = subprocess.run(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return asked.stdout.strip()


def check_checkout(folder: Path) -> Path:
    """The Python of a checkout; SystemExit with what is missing there."""
    python = folder / ".venv" / "bin" / "python"
    for needed in (python, folder / "benchmarks" / "training" / "our_side.py", folder / "lmvae_fast" / "_C.so"):
        if not needed.exists():
            raise SystemExit(
                f"{folder} has no {needed.relative_to(folder)}: clone the commit and run `make setup` in it"
            )
    return python


def compare(
    work: str, pythons: dict[str, tuple[Path, Path]], folder: Path, shape: str, batch: int, rounds: int
) -> dict[str, Any]:
    """One kind of work at one batch size: both commits checked against one another, then timed in turn."""
    module, arguments, request = WORK[work]
    threads = torch.get_num_threads()
    decoding = request == "decode"
    if decoding:
        file, _ = prepare(folder, shape, batch, threads)
    else:
        file = make_case(folder, shape, generate_corpus(4000).texts, batch, threads)
    environment = {"OMP_NUM_THREADS": str(threads)}
    sides = {
        name: Worker([str(python), "-m", module, str(file), *arguments], environment, name, where)
        for name, (python, where) in pythons.items()
    }
    try:
        if decoding:
            ids = [side.ask("ids", batch=batch)["ids"] for side in sides.values()]
            agree = ids[0] == ids[1]
            differences: dict[str, Any] = {"ids": "the same" if agree else "differ"}
        else:
            differences = gradient_differences(sides["this"], sides["other"], file.parent)
            agree = max(differences.values()) <= GRADIENTS
        if not agree and "fp32" in work:
            raise SystemExit(f"{work}, batch {batch}: the two commits disagree, nothing is timed: {differences}")
        extra = {"batch": batch} if decoding else {}
        (times,) = time_request(sides, request, rounds, **extra)
    finally:
        for side in sides.values():
            side.close()
    ratios = [other / this for this, other in zip(times["this"], times["other"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "work": work, "shape": shape, "batch": batch, "rounds": rounds, "differences": differences,
        "seconds": medians(times), "ratio": round(middle, 3), "spread": [round(low, 3), round(high, 3)],
    }  # fmt: skip


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout of the other commit, set up")
    parser.add_argument("--shape", default="gpt2-small", choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), metavar="WORK")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--other-first", action="store_true", help="start the other commit's process first")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=records.RESULTS / "commits.json")
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    other = options.other.resolve()
    pythons = {"this": (Path(sys.executable), here), "other": (check_checkout(other), other)}
    if options.other_first:
        pythons = dict(reversed(pythons.items()))
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {
        "command": "python -m benchmarks.commits CHECKOUT " + " ".join(sys.argv[2:]), "machine": machine("cpu"),
        "commits": {"this": commit_of(here), "other": commit_of(other)}, "rows": [],
    }  # fmt: skip
    for work in options.work:
        for batch in options.batches:
            with tempfile.TemporaryDirectory() as folder:
                record["rows"].append(row := compare(work, pythons, Path(folder), options.shape, batch, options.rounds))
            print(f"{work}, batch {batch}: {row['ratio']} {row['spread']} {json.dumps(row['seconds'])}", flush=True)
            records.write(record, options.output)  # after every row: a run that is stopped leaves what it measured
    return 0


if __name__ == "__main__":
    sys.exit(main())
