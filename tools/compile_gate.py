"""Compile every Triton kernel in every shipped configuration for sm_80, sm_90 and sm_100, without a GPU.

    python tools/compile_gate.py [op ...] [--match TEXT] [--update] [--fresh] [--triton 3.6] [--jobs N]

Reads `COMPILE_CASES` of each kernels/<op>/triton.py and fails when a kernel does not compile, spills registers, uses more
registers or shared memory than its case allows, divides 64-bit integers (a call of some hundred instructions), or lacks what
its case says is meant: tensor-core instructions, wgmma on sm_90, 16-byte loads. Of each kernel one case is also compiled as
Triton specialises it where an integer is 1 (it becomes a constant) or the batch is 0 (a multiple of 16).

The outcome is compared with the checked-in table benchmarks/results/compile_gate.json, which has a part for each version of
Triton: a case that is missing there, or that has lost its tensor-core instructions since, fails too. Every row carries a
digest of all that decides what the compiler makes; where it is that of the tree, the row is judged without compiling again
(`--fresh` compiles all). Cubins are kept by that digest in build/compile_gate. `--update` writes the rows of the ops given,
--match takes only cases whose key holds a text. `--triton 3.6` installs that version beside the environment's, in
build/triton-3.6, and runs with it: versions that are not the newest are compiled for sm_90 alone, the cards they run on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where this file is loaded by its path

import compile_jobs
from compile_jobs import ROOT, TARGETS, TARGETS_OF_OLDER, Job, cases_of, compile_case, jobs_of

TABLE = ROOT / "benchmarks" / "results" / "compile_gate.json"
#: Of the figures in a row: raised when `compile_jobs.read` counts something else, so that no older row is believed.
READER = 1
Rows = dict[str, dict[str, Any]]


def judge(job: Job, row: dict[str, Any], recorded: dict[str, Any] | None) -> list[str]:
    """Why this row fails the gate; empty when it passes. `recorded` is its row in the table, None while updating."""
    case = job.case
    if "error" in row:
        return [row["error"]]
    problems = []
    if row["spill_bytes"]:
        problems.append(f"spills {row['spill_bytes']} bytes")
    if row["shared"] > case.max_shared:
        problems.append(f"{row['shared']} bytes of shared memory, allowed {case.max_shared}")
    if row["division64"]:
        problems.append(f"{row['division64']} divisions of 64-bit integers")
    if case.tensor_cores and not row["matrix"]:
        problems.append("no tensor-core instruction")
    elif recorded is not None and recorded["matrix"] and not row["matrix"]:
        problems.append("lost its tensor-core instructions")
    if job.aligned and job.capability == 90:
        if row["registers"] > case.max_registers:
            problems.append(f"{row['registers']} registers, allowed {case.max_registers}")
        if case.warpgroup and not row["warpgroup"]:
            problems.append("no wgmma")
    if case.wide_loads and job.capability == 90 and (job.aligned or case.multiples) and not job.special:
        wide, middle, narrow = row["loads"]
        if 16 * wide < 8 * middle + 4 * narrow:
            problems.append(f"{wide} loads of 16 bytes beside {middle} of 8 and {narrow} of fewer")
    return problems


# ---- the table -------------------------------------------------------------------------------------------------------


def read_table() -> dict[str, Rows]:
    """Version of Triton -> key -> row; nothing of a table whose rows were read by another reader."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    return table["triton"] if table.get("reader") == READER else {}


def write_table(table: dict[str, Rows]) -> None:
    parts = []
    for version, rows in sorted(table.items()):
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items()))
        parts.append(f"{json.dumps(version)}: {{\n{lines}\n}}")
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(f'{{"reader": {READER}, "triton": {{\n' + ",\n".join(parts) + "\n}}\n")


def _line(key: str, row: dict[str, Any], before: dict[str, Any] | None) -> str:
    if "error" in row:
        return f"{key}: error"
    note = f" (was {before['registers']})" if before and before["registers"] != row["registers"] else ""
    return (
        f"{key}: {row['registers']} registers{note}, {row['shared']} B shared, {row['spill_bytes']} B spilled, "
        f"{row['matrix']} tensor-core instructions, loads {'/'.join(map(str, row['loads']))}"
    )


# ---- the run ---------------------------------------------------------------------------------------------------------


def standing(jobs: dict[str, Job], recorded: Rows) -> Rows:
    """Rows of the table that are of the code as it is: nothing would come of compiling it again."""

    def digest(job: Job) -> str:
        try:
            return job.digest()
        except ValueError:  # a case that gives an argument no type: compiling it says so
            return ""

    return {
        key: recorded[key] for key, job in jobs.items() if key in recorded and recorded[key]["source"] == digest(job)
    }


def run_gate(selected: list[str], match: str, update: bool, fresh: bool, processes: int) -> int:
    """Compile and judge; the number of failures."""
    import triton

    version = triton.__version__
    table = read_table()
    recorded: Rows = table.get(version, {})
    newest = version == _newest(table, version)
    jobs: dict[str, Job] = {}
    failures = []
    for op in selected:
        cases = cases_of(op)
        if len({case.name for case in cases}) != len(cases):
            failures.append(f"{op}: two cases of one name")
        targets = TARGETS if newest else TARGETS_OF_OLDER
        jobs |= {job.key: job for job in jobs_of(op, targets) if match in job.key}
    rows = {} if fresh else standing(jobs, recorded)
    kept = len(rows)
    print(
        f"compile gate: Triton {version}, {kept} rows stand for the code as it is, {len(jobs) - kept} to compile",
        flush=True,
    )
    left = [job for key, job in jobs.items() if key not in rows]
    with ProcessPoolExecutor(processes) as pool:
        for done, (key, row) in enumerate(pool.map(compile_case, left, chunksize=4), 1):
            rows[key] = row
            print(f"[{done}/{len(left)}] {_line(key, row, recorded.get(key))}", flush=True)
            if update and (done % 100 == 0 or done == len(left)):
                update_table(version, {k: rows[k] for k in rows if "error" not in rows[k]}, set())

    def chosen(key: str) -> bool:
        return key.split("/")[0] in selected and match in key

    gone = {key for key in recorded if chosen(key) and key not in rows}
    for key, row in rows.items():
        before = None if update else recorded.get(key)
        failures += [f"{key}: {problem}" for problem in judge(jobs[key], row, before)]
        if not update and key not in recorded:
            failures.append(f"{key}: not in the table (run with --update and commit it)")
    if update:
        update_table(version, {k: rows[k] for k in rows if "error" not in rows[k]}, gone)
    else:
        failures += [f"{key}: in the table but no longer compiled (run with --update)" for key in sorted(gone)]
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    print(f"compile gate: Triton {version}, {len(rows)} kernels, {len(left)} compiled, {len(failures)} failures")
    return len(failures)


def _newest(table: dict[str, Rows], version: str) -> str:
    return max((*table, version), key=lambda name: [int(part) for part in name.split(".")[:2]])


def update_table(version: str, rows: Rows, gone: set[str]) -> None:
    """Write rows into the table, which is read again: another op's update may have been written meanwhile."""
    table = read_table()
    kept = {key: row for key, row in table.get(version, {}).items() if key not in gone}
    write_table({**table, version: {**kept, **rows}})


def with_version(version: str, arguments: list[str]) -> int:
    """Run this file with another Triton, installed where no environment sees it."""
    folder = ROOT / "build" / f"triton-{version}"
    if not (folder / "triton").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        if subprocess.run([*pip, f"triton=={version}.*"]).returncode:
            print(f"compile gate: Triton {version} could not be installed", file=sys.stderr)
            return 2
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
    return subprocess.run([sys.executable, __file__, *arguments], env={**os.environ, "PYTHONPATH": path}).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="ops to compile (default: all that have Triton kernels)")
    parser.add_argument("--match", default="", metavar="TEXT", help="only the cases whose key holds TEXT")
    parser.add_argument("--update", action="store_true", help="write the table's rows of these ops")
    parser.add_argument("--fresh", action="store_true", help="compile also what the table has of this very code")
    parser.add_argument("--triton", metavar="VERSION", help="with this version, installed in build/triton-VERSION")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    if options.triton:
        rest = [*options.ops, "--match", options.match, "--jobs", str(options.jobs)]
        rest += [flag for flag in ("--update", "--fresh") if getattr(options, flag[2:])]
        return with_version(options.triton, rest)
    try:
        import triton  # noqa: F401
    except ImportError:
        print("compile gate: triton is not installed here, nothing can be compiled", file=sys.stderr)
        return 2
    unknown = sorted(set(options.ops) - set(compile_jobs.ops()))
    if unknown:
        parser.error(f"no Triton kernels for {', '.join(unknown)}; there are {', '.join(compile_jobs.ops())}")
    began = time.monotonic()
    failures = run_gate(options.ops or compile_jobs.ops(), options.match, options.update, options.fresh, options.jobs)
    print(f"compile gate: {time.monotonic() - began:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
