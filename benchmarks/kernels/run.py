"""Kernel benchmarks: `python -m benchmarks.kernels.run [op ...] [--threads 2] [--seconds 3] [--device cpu]`.

For each op: runs its tests first and refuses to report a speed-up while they are red; then times ours and the baseline
interleaved, and writes benchmarks/results/kernels/<op>.json and .md. Exit code 1 when tests are red or a floor is missed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.kernels import harness

HERE = Path(__file__).resolve().parent
RESULTS = harness.ROOT / "benchmarks" / "results" / "kernels"


def available() -> list[str]:
    """Ops with a bench_<op>.py."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def tests_are_green(op: str) -> bool:
    """Runs the op's tests in a process of their own."""
    path = f"tests/kernels/test_{op}.py"
    if not (harness.ROOT / path).exists():
        print(f"{op}: there is no {path}", file=sys.stderr)
        return False
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path],
        cwd=harness.ROOT, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help=f"any of {', '.join(available())} (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="per case, all sides together")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    unknown = sorted(set(options.ops) - set(available()))
    if unknown:
        parser.error(f"no benchmark for {', '.join(unknown)}; there are {', '.join(available())}")
    torch.set_num_threads(options.threads)
    failed = False
    for op in options.ops or available():
        if not tests_are_green(op):
            print(f"{op}: its tests are red, so no speed-up is reported", file=sys.stderr)
            failed = True
            continue
        torch.manual_seed(0)
        limits = harness.machine_limits(options.device)
        cases = importlib.import_module(f"benchmarks.kernels.bench_{op}").cases(options.device)
        command = f"python -m benchmarks.kernels.run {op} --threads {options.threads} --device {options.device}"
        record = {
            "op": op,
            "command": command,
            "machine": harness.machine(options.device),
            "limits": {name: round(value) for name, value in limits.items()},
            "cases": [harness.run_case(case, options.seconds, options.device, limits) for case in cases],
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        name = op if options.device == "cpu" else f"{op}_{options.device}"
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / f"{name}.md").write_text(harness.markdown(op, record))
        print(harness.markdown(op, record))
        for row in record["cases"]:
            if row["floor"] and row["speedup"] < row["floor"]:
                print(
                    f"{op}: {row['name']} reaches {row['speedup']:.2f}x, the floor is {row['floor']}x", file=sys.stderr
                )
                failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
