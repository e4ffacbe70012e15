"""Training steps, interleaved: ours against LangVAE 0.6.13, against our own eager reference, with and without torch.compile.

    python -m benchmarks.training.steps langvae [--data FILE] [--shapes gpt2-small 4x256] [--batches 8 32]
    python -m benchmarks.training.steps eager
    python -m benchmarks.training.steps body

Every side is a process of its own with the same weights, sentences and noise; steps are timed in turn, in random order
within each round. Before anything is timed the sides' losses and gradients are compared: LangVAE's with ours reading its
own greedy output under the released loss, the eager reference's with ours under teacher forcing. LangVAE has no teacher
forcing, so our teacher-forced steps are timed against its only kind of step. `body` times our own step with its decoder
layers compiled, at the one shape it compiles for. Writes
benchmarks/results/training/steps/<against>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import lmvae_fast as lf
from benchmarks.common import records
from benchmarks.common.cases import make_case
from benchmarks.common.langvae_environment import LangVAEMissing, langvae_python, langvae_worker
from benchmarks.common.timing import median_limits, speedups, time_request_and_limits
from benchmarks.common.worker import Worker
from lmvae_fast.data.corpus import generate_corpus
from lmvae_fast.profiling.measure import machine

RESULTS = records.RESULTS / "training" / "steps"
GRADIENTS = 1e-5  # the most that gradients may differ, relative, before anything is timed
OURS = ("-m", "benchmarks.training.our_side")
SIDES = {
    "langvae": {
        "free-running fp32": ("free-running", "fp32"),
        "free-running bf16": ("free-running", "bf16"),
        "teacher-forced fp32": ("teacher-forced", "fp32"),
        "teacher-forced bf16": ("teacher-forced", "bf16"),
    },
    "eager": {
        "teacher-forced fp32": ("teacher-forced", "fp32"),
        "eager": ("teacher-forced", "fp32", "plain"),
        "torch.compile": ("teacher-forced", "fp32", "compiled"),
    },
    "body": {
        "teacher-forced fp32": ("teacher-forced", "fp32"),
        "compiled body fp32": ("teacher-forced", "fp32", "body"),
        "teacher-forced bf16": ("teacher-forced", "bf16"),
        "compiled body bf16": ("teacher-forced", "bf16", "body"),
    },
}
# Whose loss and gradients must agree: (ours, the baseline).
PAIRS = {
    "langvae": ("free-running fp32", "LangVAE"),
    "eager": ("teacher-forced fp32", "eager"),
    "body": ("compiled body fp32", "teacher-forced fp32"),
}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("against", choices=SIDES)
    parser.add_argument("--data", help="sentences (default: the bundled corpus)")
    parser.add_argument("--shapes", nargs="+", default=["gpt2-small", "4x256"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.against == "langvae":
        try:
            langvae_python()
        except LangVAEMissing as error:
            print(f"comparison with LangVAE 0.6.13 skipped: {error}")
            return 0
    lines = lf.read(options.data).texts if options.data else generate_corpus(4000).texts
    record: dict[str, Any] = {
        "command": "python -m benchmarks.training.steps " + " ".join(sys.argv[1:]),
        "machine": machine("cpu"), "cases": [],
    }  # fmt: skip
    torch.set_num_threads(options.threads)
    output = options.output or RESULTS / f"{options.against}.json"
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            for batch in options.batches:
                case = make_case(Path(folder), shape, lines, batch, options.threads)
                record["cases"].append(row := compare(options.against, case, options.rounds))
                show(row)
                records.write(record, output)
    return 0


def compare(against: str, file: Path, rounds: int) -> dict[str, Any]:
    """One case: differences, times in turn, peak memory of each process, our share of the machine's matrix rate."""
    case = json.loads(file.read_text())
    environment = {"OMP_NUM_THREADS": str(case["threads"])}
    commands = {name: [sys.executable, *OURS, str(file), *what] for name, what in SIDES[against].items()}
    workers = {name: Worker(command, environment, name) for name, command in commands.items()}
    if against == "langvae":
        workers["LangVAE"] = langvae_worker(Path(__file__).with_name("langvae_side.py"), file, environment)
    ours, baseline = PAIRS[against]
    try:
        differences = gradient_differences(workers[ours], workers[baseline], file.parent)
        if differences["gradients"] > GRADIENTS:
            raise SystemExit(f"{ours} and {baseline} disagree on {file.parent.name}, nothing is timed: {differences}")
        (times,), limits = time_request_and_limits(workers, "step", rounds)
        peaks = {name: worker.ask("peak")["bytes"] for name, worker in workers.items()}
        layers = {name: workers[name].ask("layers")["layers"] for name in commands}
    finally:
        for worker in workers.values():
            worker.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    baselines = {name: baseline for name in workers if name != baseline}
    return {
        "shape": case["shape"], "batch": case["batch"], "tokens": case["tokens"], "baseline": baseline, "rounds": rounds,
        "differences": {"sides": [ours, baseline], **differences},
        "milliseconds": {name: round(1e3 * value, 2) for name, value in medians.items()},
        "speedup": speedups(times, baselines, 2), "peak_bytes": peaks, "layers": layers,
        "share_of_matrix_rate": {
            name: round(
                statistics.median(
                    case["flops"] / seconds / at_the_time[f"matmul_{dtype}_flops_per_s"]
                    for seconds, at_the_time in zip(times[name], limits, strict=True)
                ),
                3,
            )
            for name, dtype in (("teacher-forced fp32", "float32"), ("teacher-forced bf16", "bfloat16")) if name in medians
        },
        "limits": median_limits(limits),
    }  # fmt: skip


def gradient_differences(ours: Worker, baseline: Worker, folder: Path) -> dict[str, float]:
    """Relative difference of the losses, and the largest one among the gradients."""
    files = [folder / "ours.safetensors", folder / "baseline.safetensors"]
    losses = [
        worker.ask("gradients", file=str(file))["loss"] for worker, file in zip((ours, baseline), files, strict=True)
    ]
    got, want = (load_file(file) for file in files)
    worst = max(((got[name] - value).norm() / value.norm()).item() for name, value in want.items())
    for file in files:
        file.unlink()
    return {"loss": abs(losses[0] / losses[1] - 1), "gradients": worst}


def show(row: dict[str, Any]) -> None:
    """A row for people."""
    print(f"{row['shape']}, batch {row['batch']} ({row['tokens']} tokens); {row['differences']}")
    for name, value in row["milliseconds"].items():
        speedup, share = row["speedup"].get(name), row["share_of_matrix_rate"].get(name)
        print(
            f"  {name:22} {value:10.1f} ms  {row['peak_bytes'][name] / 1e9:5.2f} GB"
            + (f"  {speedup:6.2f}x" if speedup else "") + (f"  {share:.0%} of the matrix rate" if share else "")
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
