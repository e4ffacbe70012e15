"""Compile every Triton kernel in every shipped configuration for sm_80, sm_90 and sm_100, without a GPU.

    python tools/compile_gate.py [op ...] [--match TEXT] [--update] [--jobs N]

Reads `COMPILE_CASES` of each kernels/<op>/triton.py and fails when a kernel does not compile, spills registers, uses more
shared memory than its case allows, or lacks a tensor-core instruction where one is meant. Of each kernel one case is also
compiled as Triton specialises it where an integer is 1 (it becomes a constant) or the batch is 0 (a multiple of 16). The
outcome is compared with the checked-in table benchmarks/results/compile_gate.json: a case that is missing there, or that has
lost its tensor-core instructions since, fails too. `--update` rewrites the rows of the ops given, --match takes only cases
whose key holds a text: an op takes minutes. Registers are recorded and shown, not judged.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The gate compiles; the interpreter, which the tests use, would replace the very functions it needs.
os.environ.pop("TRITON_INTERPRET", None)

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "compile_gate.json"
#: (compute capability, are sizes and strides multiples of 16?)
TARGETS = ((80, False), (90, False), (90, True), (100, False))
SPECIAL_TARGET = (90, False)  # for what Triton makes of an integer that is 1, or 0
MATRIX_SASS = re.compile(r"\b(HMMA|QMMA|IMMA|DMMA|HGMMA|QGMMA|UTC[A-Z]*MMA)\b")
MATRIX_PTX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")


def ops() -> list[str]:
    """Ops that have Triton kernels, by folder."""
    return sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton.py"))


def cases_of(op: str) -> list:
    return importlib.import_module(f"lmvae_fast.kernels.{op}.triton").COMPILE_CASES


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_cubin(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    if "REG" not in found:
        raise RuntimeError(f"cuobjdump says nothing about registers: {usage.stdout}{usage.stderr}")
    out = {"registers": found["REG"], "spill_bytes": found.get("STACK", 0) + found.get("LOCAL", 0)}
    if sass.returncode == 0:
        out["matrix_sass"] = len(MATRIX_SASS.findall(sass.stdout))
    return out


@dataclass(frozen=True)
class Job:
    """One compilation: case number `index` of an op, for a compute capability. aligned: all sizes and strides are multiples
    of 16. ones: integers that are 1. zeros: integers that are 0; what they are called in the key is `special`."""

    op: str
    index: int
    capability: int
    aligned: bool
    special: str = ""
    ones: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()

    @property
    def case(self) -> Any:
        return cases_of(self.op)[self.index]

    @property
    def key(self) -> str:
        """Its key in the table."""
        special = f"-{self.special}" if self.special else ""
        return f"{self.op}/{self.case.name}{special}/sm_{self.capability}" + ("-aligned" if self.aligned else "")


def integers_of(case: Any) -> list[str]:
    """The run-time integers of a case, in the order of the kernel's arguments."""
    return [name for name in case.kernel.arg_names if case.signature.get(name) in ("i32", "i64")]


def fullest_cases(op: str) -> dict[str, int]:
    """Of each kernel the case with the most of its code: the first with the most flags set."""
    best: dict[str, tuple[int, int]] = {}
    for index, case in enumerate(cases_of(op)):
        flags = sum(value is True for value in {**case.config.constants, **case.constants}.values())
        name = case.kernel.fn.__name__
        if name not in best or flags > best[name][0]:
            best[name] = (flags, index)
    return {name: index for name, (_, index) in best.items()}


def jobs_of(op: str) -> Iterator[Job]:
    """Every case on every target; then of each kernel one case with each size at 1, with all strides at 1, with all of
    them at 1, with an empty batch."""
    for index in range(len(cases_of(op))):
        for capability, aligned in TARGETS:
            yield Job(op, index, capability, aligned)
    for index in fullest_cases(op).values():
        integers = integers_of(cases_of(op)[index])
        strides = tuple(name for name in integers if name.startswith("stride_"))
        for name in integers:
            if name not in strides:
                yield Job(op, index, *SPECIAL_TARGET, special=f"{name}=1", ones=(name,))
        if strides:
            yield Job(op, index, *SPECIAL_TARGET, special="strides=1", ones=strides)
        yield Job(op, index, *SPECIAL_TARGET, special="all=1", ones=tuple(integers))
        if "batch" in integers:
            yield Job(op, index, *SPECIAL_TARGET, special="batch=0", zeros=("batch",))


def compile_case(job: Job) -> tuple[str, dict]:
    """Compile one job: its key in the table, and the compiler's figures."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case, key = job.case, job.key
    # An int in the signature is an argument that Triton turns into a constant (a unit stride); pointers are 16-aligned,
    # as torch's allocations are: that is what the JIT specialises to, and what the table should describe.
    fixed = {name: kind for name, kind in case.signature.items() if isinstance(kind, int)}
    fixed |= dict.fromkeys(job.ones, 1)
    constants = {**case.config.constants, **case.constants, **fixed}
    signature = {n: "constexpr" if n in constants else case.signature.get(n, "") for n in case.kernel.arg_names}
    missing = [name for name, kind in signature.items() if not kind]
    if missing:
        return key, {"error": f"arguments without a type: {', '.join(missing)}"}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(case.kernel.arg_names)
        if (signature[name].startswith("*") and name not in case.unaligned)
        or ((job.aligned or name in job.zeros) and signature[name] in ("i32", "i64"))
    }
    source = ASTSource(case.kernel, signature, constants, attrs)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=case.config.options)
        row = {"shared": compiled.metadata.shared, **_read_cubin(compiled.asm["cubin"])}
        row["matrix_ptx"] = len(MATRIX_PTX.findall(compiled.asm["ptx"]))
    except Exception as error:
        return key, {"error": f"{type(error).__name__}: {error}"[-1500:]}
    return key, row


def judge(case, row: dict, recorded: dict | None) -> list[str]:
    """Why this row fails the gate; empty when it passes. `recorded` is its row in the table, None while updating."""
    if "error" in row:
        return [row["error"]]
    problems = []
    if row["spill_bytes"]:
        problems.append(f"spills {row['spill_bytes']} bytes")
    if row["shared"] > case.max_shared:
        problems.append(f"{row['shared']} bytes of shared memory, allowed {case.max_shared}")
    matrix = max(row["matrix_ptx"], row.get("matrix_sass", 0))
    if case.tensor_cores and not matrix:
        problems.append("no tensor-core instruction")
    if recorded is not None and max(recorded.get("matrix_ptx", 0), recorded.get("matrix_sass", 0)) and not matrix:
        problems.append("lost its tensor-core instructions")
    return problems


def _line(key: str, row: dict, before: dict | None) -> str:
    note = f" (was {before['registers']})" if before and before["registers"] != row["registers"] else ""
    return (
        f"{key}: {row['registers']} registers{note}, {row['shared']} B shared, {row['spill_bytes']} B spilled, "
        f"{max(row['matrix_ptx'], row.get('matrix_sass', 0))} tensor-core instructions"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="ops to compile (default: all that have Triton kernels)")
    parser.add_argument("--match", default="", metavar="TEXT", help="only the cases whose key holds TEXT")
    parser.add_argument("--update", action="store_true", help="rewrite the table's rows of these ops")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    try:
        import triton
    except ImportError:
        print("compile gate: triton is not installed here, nothing can be compiled", file=sys.stderr)
        return 2
    unknown = sorted(set(options.ops) - set(ops()))
    if unknown:
        parser.error(f"no Triton kernels for {', '.join(unknown)}; there are {', '.join(ops())}")
    selected = options.ops or ops()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"cases": {}}

    jobs, by_key = [], {}
    for op in selected:
        cases = cases_of(op)
        if len({case.name for case in cases}) != len(cases):
            print(f"compile gate: {op} has two cases of one name", file=sys.stderr)
            return 1
        chosen = [job for job in jobs_of(op) if options.match in job.key]
        jobs += chosen
        by_key |= {job.key: job.case for job in chosen}
    started, rows, failures = time.monotonic(), {}, []
    with ProcessPoolExecutor(options.jobs) as pool:
        for key, row in pool.map(compile_case, jobs, chunksize=4):
            rows[key] = row
            recorded = None if options.update else table["cases"].get(key)
            problems = judge(by_key[key], row, recorded)
            if not options.update and key not in table["cases"]:
                problems.append("not in the table (run with --update and commit it)")
            failures += [f"{key}: {problem}" for problem in problems]
            print(_line(key, row, table["cases"].get(key)) if "error" not in row else f"{key}: error", flush=True)

    def judged(key: str) -> bool:
        return key.split("/")[0] in selected and options.match in key

    gone = [key for key in table["cases"] if judged(key) and key not in rows]
    if options.update:
        # read again: another op's update may have been written while this one compiled
        table = json.loads(TABLE.read_text()) if TABLE.exists() else {"cases": {}}
        kept = {key: value for key, value in table["cases"].items() if not judged(key)}
        good = {key: row for key, row in rows.items() if "error" not in row}
        table = {"triton": triton.__version__, "cases": dict(sorted({**kept, **good}.items()))}
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        head = f'{{"triton": {json.dumps(table["triton"])}, "cases": {{\n'
        lines = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in table["cases"].items())
        TABLE.write_text(head + lines + "\n}}\n")
    else:
        failures += [f"{key}: in the table but no longer compiled (run with --update)" for key in gone]
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    capabilities = "/".join(map(str, sorted({capability for capability, _ in TARGETS})))
    seconds = time.monotonic() - started
    print(f"compile gate: {len(rows)} kernels for sm_{capabilities} in {seconds:.0f} s, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
