"""Everything that only a CUDA machine can show, in one call of less than nine minutes: `make gpu`.

    python tools/gpu_check.py [--output DIR] [--budget 520] [--stage NAME ...] [--dry-run]

Stages, each in processes of its own with a time limit; a stage that fails does not keep the later ones from running:

    environment  device, driver, versions, commit, rates of a copy and of a matrix product
    build        installs this tree with its C++ extension (pip -e; else setup.py build_ext and a folder of links)
    tests        pytest -m gpu tests/gpu: the kernels, in several processes where pytest-xdist is installed
    loop_tests   the rest of them: whole models, training, generation
    training     lf.train in bf16 at batch 32 and 256, steps recorded and launched, and one of each under the profiler
    decoding     lf.generate at 1, 32, 256 and 1024, recorded and launched
    benchmarks   benchmarks/kernels on CUDA: eager, torch.compile, share of the limits measured in the same run
    end_to_end   a training step and decoding at GPT-2-small's shape against the eager reference
    counters     Nsight Compute's counters of three kernels, where it is installed and may count
    large        the tests that need tens of GiB of device memory, one at a time
    sanitizer    compute-sanitizer memcheck over the small tests, where it is installed and supports the device

Python is the one that runs this file: it must have torch with CUDA, triton, transformers, pytest and hypothesis. Nothing is
downloaded and no setting of the card is touched. Files below --output (default: $OUT, else benchmarks/results/gpu):
summary.json, log.txt, tests.xml, loop_tests.xml, large.xml, loops_train.json, loops_decode.json, benchmarks.json,
benchmarks.md, end_to_end.json, counters.csv. The exit code is 1 when the
build, a test or the sanitizer failed or ran out of time, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where this file is loaded by its path

from gpu_measurements import benchmarks, counters, end_to_end, loop
from gpu_stages import (
    LOG_BYTES,
    LOOP_TESTS,
    RED,
    ROOT,
    Context,
    Stage,
    build,
    environment,
    large,
    sanitizer,
    skipped,
    tests_of,
)

STAGES = (
    Stage("environment", 10, 60, environment),
    Stage("build", 40, 180, build),
    Stage("tests", 80, 180, tests_of("tests", ["tests/gpu"], *(f"--ignore={path}" for path in LOOP_TESTS))),
    Stage("loop_tests", 25, 70, tests_of("loop_tests", LOOP_TESTS)),
    Stage("training", 30, 70, loop("train")),
    Stage("decoding", 35, 75, loop("decode")),
    Stage("benchmarks", 50, 130, benchmarks),
    Stage("end_to_end", 25, 50, end_to_end),
    Stage("counters", 15, 40, counters),
    Stage("large", 20, 60, large),
    Stage("sanitizer", 20, 90, sanitizer),
)


def run_stages(context: Context, stages: Sequence[Stage]) -> dict[str, Any]:
    """All stages in order, each within what the budget leaves once the least of the later ones is kept free."""
    summary: dict[str, Any] = {"budget_seconds": context.budget, "dry_run": context.dry, "stages": {}}
    for i, stage in enumerate(stages):
        later = sum(s.least for s in stages[i + 1 :])
        seconds = min(stage.most, context.left() - later)
        print(f"== {stage.name}", flush=True)
        began = time.monotonic()
        if seconds < min(5.0, stage.least):
            result = skipped("the budget is used up")
        else:
            try:
                result = stage.run(context, seconds)
            except Exception as error:  # a fault of this script must not cost the later stages
                result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        result = {"status": result["status"], "seconds": round(time.monotonic() - began, 1), **result}
        summary["stages"][stage.name] = result
        (context.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        if stage.name == "environment" and result["status"] == "failed" and "facts" in result:
            break  # no device: nothing else means anything
    summary["seconds"] = round(time.monotonic() - context.started, 1)
    summary["red"] = [name for name, result in summary["stages"].items() if result["status"] in RED]
    (context.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    _shorten(context.output / "log.txt")
    return summary


def _shorten(log: Path) -> None:
    if log.exists() and log.stat().st_size > LOG_BYTES:
        text = log.read_bytes()
        log.write_bytes(text[: LOG_BYTES // 2] + b"\n[...]\n" + text[-LOG_BYTES // 2 :])


def table(summary: dict[str, Any]) -> str:
    lines = [f"{'stage':<12} {'status':<8} {'seconds':>8}  what"]
    for name, result in summary["stages"].items():
        what = result.get("reason", "")
        if name == "environment" and "facts" in result:
            facts = result["facts"]
            what = (
                what
                or f"{facts.get('device')}, torch {facts['torch']}, triton {facts['triton']}, Python {facts['python']}"
            )
        elif name == "build":
            what = f"{result.get('way', 'no way')} of {', '.join(t['way'] for t in result.get('tried', []))}"
        elif "tests" in result:
            what = f"{result.get('passed', 0)} passed, {result.get('failed', 0)} failed, {result.get('skipped', 0)} skipped"
            what += "".join(f"\n{'':<31}red: {test}" for test in result.get("red", [])[:25])
        elif name in ("training", "decoding"):
            what = what or "; ".join(f"{r['way']} batch {r['batch']}: {r['ms']} ms" for r in result.get("rows", []))
        elif name == "benchmarks" and "ops" in result:
            what = ", ".join(f"{op}: {r['rows']} rows ({r['status']})" for op, r in result["ops"].items())
        elif name == "end_to_end":
            what = what or "; ".join(
                f"{r['what']} {r['precision']}: {r['milliseconds']['ours']} ms against {r['milliseconds']['reference']}"
                for r in result.get("rows", [])
            )
            what += "".join(f"\n{'':<31}{line}" for line in result.get("expected", []))
        lines.append(f"{name:<12} {result['status']:<8} {result['seconds']:>8.1f}  {what}")
    lines.append(
        f"{summary['seconds']:.0f} s of {summary['budget_seconds']:.0f}; red: {', '.join(summary['red']) or 'nothing'}"
    )
    return "\n".join(lines)


def _commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu"
    parser.add_argument("--output", type=Path, default=Path(default))
    parser.add_argument("--budget", type=float, default=520.0, help="seconds for everything")
    parser.add_argument(
        "--stage", nargs="+", choices=[s.name for s in stages], help="these only (the build is then assumed)"
    )
    parser.add_argument("--workers", type=int, default=min(12, max(1, len(os.sched_getaffinity(0)) * 3 // 4)))
    parser.add_argument("--commit", help="of this tree, where it came without its history")
    parser.add_argument("--dry-run", action="store_true", help="without a CUDA device: what can be tried there")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    options.output = options.output.resolve()
    (options.output / "log.txt").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as scratch:
        context = Context(
            options.output, Path(scratch), options.budget, options.dry_run, options.workers, options.commit or _commit()
        )
        chosen = [s for s in stages if options.stage is None or s.name in options.stage]
        summary = run_stages(context, chosen)
    print(table(summary))
    first = summary["stages"].get("environment", {})
    if first.get("status") == "failed" and not first.get("facts", {"available": True})["available"]:
        print("no CUDA device: --dry-run runs what can be tried without one", file=sys.stderr)
        return 2
    return 1 if summary["red"] else 0


if __name__ == "__main__":
    sys.exit(main())
