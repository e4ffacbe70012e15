"""What the compile gate compiles, and what it reads in the machine code: jobs, their digests, cubins kept by digest."""

from __future__ import annotations

import ast
import functools
import gzip
import hashlib
import importlib
import inspect
import json
import os
import re
import subprocess
import tempfile
import textwrap
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The gate compiles; the interpreter, which the tests use, would replace the very functions it needs.
os.environ.pop("TRITON_INTERPRET", None)

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "compile_gate"
#: (compute capability, are sizes and strides multiples of 16?)
TARGETS = ((80, False), (90, False), (90, True), (100, False))
#: Of a Triton that is not the newest: what it is kept for, which is the Hopper cards it is installed on.
TARGETS_OF_OLDER = ((90, False), (90, True))
SPECIAL_TARGET = (90, False)  # for what Triton makes of an integer that is 1, or 0

MATRIX_SASS = re.compile(r"\b(?:HMMA|QMMA|IMMA|DMMA|HGMMA|QGMMA|UTC[A-Z]*MMA)\b")
WARPGROUP_SASS = re.compile(r"\b(?:HGMMA|QGMMA|UTC[A-Z]*MMA)\b")
MATRIX_PTX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
DIVISION_PTX = re.compile(r"\b(?:div|rem)\.[su]64\b")
#: Loads from and stores to global memory, with the bits of an access (32 where none are named).
LOAD_SASS = re.compile(r"\bLDG(?:STS)?((?:\.[A-Z0-9_]+)*)\b")
STORE_SASS = re.compile(r"\bSTG((?:\.[A-Z0-9_]+)*)\b")


def ops() -> list[str]:
    """Ops that have Triton kernels, by folder."""
    return sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton.py"))


def cases_of(op: str) -> list:
    return importlib.import_module(f"lmvae_fast.kernels.{op}.triton").COMPILE_CASES


# ---- jobs ------------------------------------------------------------------------------------------------------------


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

    def arguments(self) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list]]:
        """Signature, constants and attributes as triton.compile takes them.

        An int in a case's signature is an argument that Triton turns into a constant (a unit stride); pointers are
        16-aligned, as torch's allocations are: that is what the JIT specialises to, and what the table should describe.
        Raises ValueError for a case that gives an argument no type.
        """
        case = self.case
        fixed = {name: kind for name, kind in case.signature.items() if isinstance(kind, int)}
        fixed |= dict.fromkeys(self.ones, 1)
        constants = {**case.config.constants, **case.constants, **fixed}
        signature = {n: "constexpr" if n in constants else case.signature.get(n, "") for n in case.kernel.arg_names}
        if missing := [name for name, kind in signature.items() if not kind]:
            raise ValueError(f"arguments without a type: {', '.join(missing)}")
        attributes = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(case.kernel.arg_names)
            if (signature[name].startswith("*") and name not in case.unaligned)
            or ((self.aligned or name in (*self.zeros, *case.multiples)) and signature[name] in ("i32", "i64"))
        }
        return signature, constants, attributes

    def digest(self) -> str:
        """Of all that decides what the compiler makes: Triton's version, sources, arguments, options, target."""
        import triton

        described = (triton.__version__, source_of(self.case.kernel), self.arguments(), self.case.config.options)
        return hashlib.sha256(repr((*described, self.capability)).encode()).hexdigest()[:16]


def integers_of(case: Any) -> list[str]:
    """The run-time integers of a case, in the order of the kernel's arguments."""
    return [name for name in case.kernel.arg_names if case.signature.get(name) in ("i32", "i64")]


def fullest_cases(op: str) -> dict[str, int]:
    """Of each kernel the case with the most of its code: the first with the most flags set."""
    best: dict[str, tuple[int, int]] = {}
    for index, case in enumerate(cases_of(op)):
        if case.only_aligned:
            continue
        flags = sum(value is True for value in {**case.config.constants, **case.constants}.values())
        name = case.kernel.fn.__name__
        if name not in best or flags > best[name][0]:
            best[name] = (flags, index)
    return {name: index for name, (_, index) in best.items()}


def jobs_of(op: str, targets: tuple[tuple[int, bool], ...] = TARGETS) -> Iterator[Job]:
    """Every case on every target; then of each kernel one case with each size at 1, with all strides at 1, with all of
    them at 1, with an empty batch."""
    for index, case in enumerate(cases_of(op)):
        known = [target for target in targets if target[0] >= 90 or not case.config.dependent]
        for capability, aligned in dict.fromkeys((c, aligned or case.only_aligned) for c, aligned in known):
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


@functools.cache
def source_of(kernel: Any) -> str:
    """The code of a kernel and of all that it calls, and the values of the names that they read; without comments, and
    without the place where it stands, so that a digest of it changes when the machine code may."""
    seen: dict[str, str] = {}

    def visit(name: str, value: Any) -> None:
        if name in seen:
            return
        function = getattr(value, "fn", None)
        if not callable(function):
            seen[name] = repr(getattr(value, "value", value))
            return
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        seen[name] = ast.unparse(tree)
        for node in ast.walk(tree):
            found = function.__globals__.get(node.id) if isinstance(node, ast.Name) else None
            if hasattr(found, "fn") or isinstance(found, (int, float, str)) or type(found).__name__ == "constexpr":
                visit(f"{function.__module__}.{node.id}", found)

    visit(kernel.fn.__name__, kernel)
    return "\n".join(f"{name}: {text}" for name, text in sorted(seen.items()))


# ---- compilation -----------------------------------------------------------------------------------------------------


def compiled(job: Job, digest: str) -> dict[str, Any]:
    """{"shared": bytes, "ptx": text, "cubin": bytes} of a job: from the folder of cubins where it has been compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kept = CACHE / f"{digest}.gz"
    if kept.exists():
        found = json.loads(gzip.decompress(kept.read_bytes()))
        return {**found, "cubin": b64decode(found["cubin"])}
    signature, constants, attributes = job.arguments()
    source = ASTSource(job.case.kernel, signature, constants, attributes)
    with tempfile.TemporaryDirectory(prefix="compile_gate_") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        made = triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=job.case.config.options)
    out = {"shared": made.metadata.shared, "ptx": made.asm["ptx"], "cubin": made.asm["cubin"]}
    CACHE.mkdir(parents=True, exist_ok=True)
    part = CACHE / f"{digest}.{os.getpid()}"
    part.write_bytes(gzip.compress(json.dumps({**out, "cubin": b64encode(out["cubin"]).decode()}).encode(), 6))
    part.replace(kept)
    return out


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def widths(pattern: re.Pattern, sass: str) -> list[int]:
    """How many accesses are of 16 bytes, of 8, and of less."""
    counts = [0, 0, 0]
    for match in pattern.finditer(sass):
        parts = match.group(1).split(".")
        counts[0 if "128" in parts else 1 if "64" in parts else 2] += 1
    return counts


def read(made: dict[str, Any]) -> dict[str, Any]:
    """The figures of a compiled kernel. Raises RuntimeError where the tools that Triton brings say nothing.

    loads, stores: accesses to global memory of 16, of 8 and of fewer bytes. matrix: products on tensor cores; warpgroup:
    those of them that a whole warpgroup issues (wgmma, tcgen05). division64: 64-bit integer divisions, calls of some
    hundred instructions.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made["cubin"])
        file.flush()
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True)
        dumped = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    if "REG" not in found:
        raise RuntimeError(f"cuobjdump says nothing about registers: {usage.stdout}{usage.stderr}")
    if dumped.returncode != 0:
        raise RuntimeError(f"nvdisasm cannot read the machine code: {dumped.stderr}")
    sass, ptx = dumped.stdout, made["ptx"]
    return {
        "registers": found["REG"],
        "spill_bytes": found.get("STACK", 0) + found.get("LOCAL", 0),
        "shared": made["shared"],
        "matrix": max(len(MATRIX_SASS.findall(sass)), len(MATRIX_PTX.findall(ptx))),
        "warpgroup": len(WARPGROUP_SASS.findall(sass)),
        "loads": widths(LOAD_SASS, sass),
        "stores": widths(STORE_SASS, sass),
        "division64": len(DIVISION_PTX.findall(ptx)),
    }


def compile_case(job: Job) -> tuple[str, dict[str, Any]]:
    """Compile one job: its key in the table, and its row there, {"error": why} where it does not compile."""
    try:
        digest = job.digest()
        return job.key, {"source": digest, **read(compiled(job, digest))}
    except Exception as error:
        return job.key, {"error": f"{type(error).__name__}: {error}"[-1500:]}
