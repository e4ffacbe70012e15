"""Kernel benchmarks: `python -m benchmarks.kernels.run [op ...] [--threads 2] [--seconds 3] [--device cpu]`.

For each op: runs its tests on that device first (or reads their outcome from --junit) and refuses to report a speed-up
while they are red; then times ours and the baseline interleaved, and writes <op>.json and .md below --output, for CUDA
<op>_cuda.json and .md. Where there is no tests/ folder at all (a copy without it), it measures, and the record says that
nothing was tested. Exit code 1 when tests are red or a floor is missed; floors are those of the CPU.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks.common import records
from benchmarks.common.records import ROOT
from benchmarks.kernels import harness
from lmvae_fast.profiling.measure import machine, machine_limits

HERE = Path(__file__).resolve().parent
RESULTS = records.RESULTS / "kernels"


def available() -> list[str]:
    """Ops with a bench_<op>.py."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def tests_of(op: str, device: str) -> str:
    """The file of an op's tests on a device."""
    return f"tests/kernels/test_{op}.py" if device == "cpu" else f"tests/gpu/test_cuda_{op}.py"


def devices_of(op: str) -> tuple[str, ...]:
    """The devices that an op is for: DEVICES of its bench_<op>.py, read without importing it and its baseline."""
    for node in ast.parse((HERE / f"bench_{op}.py").read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["DEVICES"]:
            return tuple(ast.literal_eval(node.value))
    return ("cpu", "cuda")


def recorded_green(path: str, junit: Path) -> bool:
    """True if a JUnit file that pytest wrote has passed tests of this file and no failed one."""
    module = path.removesuffix(".py").replace("/", ".")
    passed = False
    for case in ElementTree.parse(junit).iter("testcase"):
        if case.get("classname", "").startswith(module):
            if case.find("failure") is not None or case.find("error") is not None:
                return False
            passed |= case.find("skipped") is None
    return passed


def tests_are_green(op: str, device: str) -> bool:
    """Run the op's tests in a process of their own; True if they pass."""
    path = tests_of(op, device)
    if not (ROOT / path).exists():
        print(f"{op}: there is no {path}", file=sys.stderr)
        return False
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path, *(["-m", "gpu"] * (device == "cuda"))],
        cwd=ROOT, capture_output=True, text=True, env=environment,
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
    parser.add_argument("--junit", type=Path, help="outcome of the tests of this very tree: they are not run again")
    parser.add_argument(
        "--compile-seconds", type=float, default=60.0,
        help="on CUDA, torch.compile of the baselines is compared too, until compiling has taken this long per op",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args()
    unknown = sorted(set(options.ops) - set(available()))
    if unknown:
        parser.error(f"no benchmark for {', '.join(unknown)}; there are {', '.join(available())}")
    torch.set_num_threads(options.threads)
    failed = False
    for op in options.ops or available():
        if options.device not in devices_of(op):
            print(f"{op}: not measured, it is not for {options.device}")
            continue
        tested = (ROOT / "tests").is_dir() or options.junit is not None
        if tested:
            path = tests_of(op, options.device)
            green = recorded_green(path, options.junit) if options.junit else tests_are_green(op, options.device)
            if not green:
                print(f"{op}: its tests are red, so no speed-up is reported", file=sys.stderr)
                failed = True
                continue
        else:
            print(f"{op}: not tested, there is no tests/ folder here", file=sys.stderr)
        torch.manual_seed(0)
        try:
            cases = importlib.import_module(f"benchmarks.kernels.bench_{op}").cases(options.device)
        except ImportError as error:  # a baseline's package, such as FrEIA
            print(f"{op}: not measured, its baseline cannot be imported: {error}", file=sys.stderr)
            failed = True
            continue
        limits = machine_limits(options.device, 1.0 if options.device == "cpu" else 0.3)
        record = {
            "op": op,
            "command": f"python -m benchmarks.kernels.run {op} --threads {options.threads} --device {options.device}",
            "machine": machine(options.device),
            "tests": "passed" if tested else "none: there is no tests/ folder",
            "limits": {name: round(value) for name, value in limits.items()},
            "cases": [],
        }
        options.output.mkdir(parents=True, exist_ok=True)
        name = op if options.device == "cpu" else f"{op}_{options.device}"
        compiling = options.compile_seconds if options.device == "cuda" else 0.0
        for case in cases:
            row = harness.run_case(case, options.seconds, options.device, limits, compile_baseline=compiling > 0)
            compiling -= row.get("compile_seconds", 0.0)
            record["cases"].append(row)
            # after every case: a run that is stopped leaves those it has measured
            (options.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
            (options.output / f"{name}.md").write_text(harness.markdown(op, record))
        print(harness.markdown(op, record))
        for row in record["cases"]:
            if options.device == "cpu" and row["floor"] and row["speedup"] < row["floor"]:
                print(
                    f"{op}: {row['name']} reaches {row['speedup']:.2f}x, the floor is {row['floor']}x", file=sys.stderr
                )
                failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
