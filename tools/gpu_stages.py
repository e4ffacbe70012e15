"""The stages of `gpu_check.py`: what each runs, within which time, and what it makes of the outcome."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
LOG_BYTES = 15 << 20  # of log.txt, which is cut in the middle beyond that
RED = ("failed", "timeout")


@dataclass
class Done:
    """Outcome of a command: its exit status (None when it was stopped), seconds, and the end of its output."""

    code: int | None
    seconds: float
    tail: str

    @property
    def timed_out(self) -> bool:
        return self.code is None


@dataclass
class Context:
    """What stages share: the options, where files go, and the environment and folder of commands, which the build chooses."""

    output: Path
    scratch: Path
    budget: float = 520.0
    dry: bool = False
    workers: int = 8
    commit: str = "unknown"
    device: str = ""
    started: float = field(default_factory=time.monotonic)
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: Path = ROOT

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.started)

    def run(self, command: Sequence[str], seconds: float, **environment: str) -> Done:
        """Run a command in `folder`, the root of the repository or links to it; its output goes to log.txt.

        When its time is up it gets SIGINT (pytest then still writes its report), 15 seconds later it is killed with all
        that it started.
        """
        shown = " ".join(map(str, command)).strip()
        print(f"  $ {shown.splitlines()[0][:110]}   (at most {seconds:.0f} s)", flush=True)
        log = self.scratch / "command.log"
        began = time.monotonic()
        code: int | None
        with log.open("wb") as file:
            try:
                process = subprocess.Popen(
                    [str(part) for part in command], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT, env={**self.environment, **environment}, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                file.write(f"{error}\n".encode())
                process = None
            code = None if process is None else self._wait(process, seconds)
        text = log.read_bytes()
        with (self.output / "log.txt").open("ab") as whole:
            whole.write(f"\n$ {' '.join(map(str, command))}\n".encode() + text[-LOG_BYTES // 3 :])
            whole.write(f"[exit status {code}, {time.monotonic() - began:.1f} s]\n".encode())
        tail = text[-6000:].decode(errors="replace")
        return Done(127 if process is None else code, round(time.monotonic() - began, 1), tail)

    @staticmethod
    def _wait(process: subprocess.Popen, seconds: float) -> int | None:
        try:
            return process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            pass
        for number, patience in ((signal.SIGINT, 15.0), (signal.SIGKILL, 15.0)):
            try:
                # SIGINT to the leader alone: pytest-xdist ends its workers itself
                if number == signal.SIGINT:
                    process.send_signal(number)
                else:
                    os.killpg(process.pid, number)
                process.wait(patience)
                break
            except (subprocess.TimeoutExpired, ProcessLookupError):
                continue
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the leader left behind
        return None


@dataclass(frozen=True)
class Stage:
    """run(context, seconds) returns {"status": "ok" | "failed" | "timeout" | "partial" | "skipped", ...}.

    least: seconds kept free for it while earlier stages run; most: the longest it may take.
    """

    name: str
    least: float
    most: float
    run: Callable[[Context, float], dict[str, Any]]


def verdict(done: Done) -> str:
    return "timeout" if done.timed_out else "ok" if done.code == 0 else "failed"


def skipped(reason: str) -> dict[str, Any]:
    return {"status": "skipped", "reason": reason}


# ---- stages ----------------------------------------------------------------------------------------------------------

_FACTS = """
import importlib.metadata as m, importlib.util, json, torch
out = {"torch": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
for name in ("triton", "transformers", "numpy", "pytest", "hypothesis", "pytest-xdist", "FrEIA", "liger-kernel"):
    try: out[name] = m.version(name)
    except m.PackageNotFoundError: out[name] = None
if out["available"]:
    p = torch.cuda.get_device_properties(0)
    out |= {"device": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory,
            "multiprocessors": p.multi_processor_count, "l2_bytes": getattr(p, "L2_cache_size", None),
            "arch_list": torch.cuda.get_arch_list()}
    def rate(work, times=20):
        for _ in range(3): work()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times): work()
        end.record(); torch.cuda.synchronize()
        return start.elapsed_time(end) / times / 1e3
    a, b = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    x, y = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out |= {"copy_TB_s": round(2 * a.numel() / rate(lambda: b.copy_(a)) / 1e12, 3),
            "matmul_bf16_TFLOP_s": round(2 * 8192**3 / rate(lambda: x @ y) / 1e12, 1)}
print("FACTS " + json.dumps(out))
"""


def environment(context: Context, seconds: float) -> dict[str, Any]:
    done = context.run([sys.executable, "-c", _FACTS], seconds)
    line = next((x for x in done.tail.splitlines() if x.startswith("FACTS ")), None)
    if line is None:
        return {"status": verdict(done) if done.code else "failed", "tail": done.tail}
    facts = {"python": platform.python_version(), "commit": context.commit, **json.loads(line.removeprefix("FACTS "))}
    query = (
        "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,temperature.gpu,power.draw,persistence_mode"
    )
    for name, command in (
        ("nvidia_smi", ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]),
        ("nvcc", [find("nvcc") or "nvcc", "--version"]),
        ("sanitizer", [find("compute-sanitizer") or "compute-sanitizer", "--version"]),
        ("compiler", [os.environ.get("CXX", "g++"), "--version"]),
    ):
        told = context.run(command, 20)
        facts[name] = (
            told.tail.strip().splitlines()[-1 if name in ("nvidia_smi", "nvcc") else 0] if told.code == 0 else None
        )
    context.device = str(facts.get("device", ""))
    facts["cpus"] = len(os.sched_getaffinity(0))
    if not facts["available"] and not context.dry:
        return {"status": "failed", "reason": "torch.cuda.is_available() is false", "facts": facts}
    return {"status": "ok", "facts": facts}


def find(program: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which(program) or shutil.which(program, path=os.pathsep.join(places))


def link_package(folder: Path) -> Path:
    """A folder like the root of the repository in which lmvae_fast has kernels/ as lmvae_fast.kernels.

    Commands run in it: `python -c` and `python -m` look where they run before they look at PYTHONPATH, and at the root
    they would find an lmvae_fast without kernels.
    """
    package = folder / "site" / "lmvae_fast"
    package.mkdir(parents=True, exist_ok=True)
    parts = [(package, source) for source in (*sorted((ROOT / "lmvae_fast").iterdir()), ROOT / "kernels")]
    parts += [(package.parent, ROOT / name) for name in ("benchmarks", "tests", "tools", "pyproject.toml")]
    for where, source in parts:
        link = where / source.name
        if source.name != "__pycache__" and not link.is_symlink():
            link.symlink_to(source)
    return package.parent


def use_links(context: Context) -> None:
    """From here on commands run with, and import, the linked package."""
    context.folder = link_package(context.scratch)
    path = [str(context.folder), context.environment.get("PYTHONPATH", "")]
    context.environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))


_IMPORT = """
import lmvae_fast
from lmvae_fast.kernels import backend
loaded, reason = backend.extension()
print("EXTENSION", loaded, reason, lmvae_fast.__file__)
raise SystemExit(0 if loaded else 3)
"""


def build(context: Context, seconds: float) -> dict[str, Any]:
    """Three ways, until one gives an importable package with its extension; Triton's tests run without it, too."""
    finish = time.monotonic() + seconds
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    pip += ["--disable-pip-version-check", "--root-user-action", "ignore", "-e", "."]
    ways: list[tuple[str, list[str] | None]] = [
        ("pip", pip),
        ("build_ext", [sys.executable, "setup.py", "build_ext", "--inplace"]),
        ("links only", None),
    ]
    tried: list[dict[str, Any]] = []
    if context.dry:
        ways = [("as it is", None)]
    for name, command in ways:
        done = Done(0, 0.0, "")
        if command is not None:
            context.folder = ROOT
            done = context.run(command, finish - time.monotonic(), LMVAE_BUILD_CSRC="1")
        if name in ("build_ext", "links only"):
            use_links(context)
        imported = context.run([sys.executable, "-c", _IMPORT], 60)
        told = next((x for x in imported.tail.splitlines() if x.startswith("EXTENSION")), imported.tail[-1500:])
        tried.append({"way": name, "status": verdict(done), "seconds": done.seconds, "import": told})
        if done.code:
            tried[-1]["tail"] = done.tail[-3000:]
        if imported.code == 0:
            return {"status": "ok", "way": name, "tried": tried}
    return {"status": "failed", "tried": tried}


def counts(junit: Path) -> dict[str, Any]:
    """Tests by outcome from a JUnit file, and the names of those that failed."""
    if not junit.exists():
        return {"tests": 0}
    found: dict[str, Any] = {"tests": 0, "passed": 0, "failed": 0, "skipped": 0, "red": []}
    for case in ElementTree.parse(junit).iter("testcase"):
        found["tests"] += 1
        kind = "passed"
        if case.find("failure") is not None or case.find("error") is not None:
            kind = "failed"
            found["red"].append(f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}")
        elif case.find("skipped") is not None:
            kind = "skipped"
        found[kind] += 1
    return found


def run_pytest(
    context: Context, seconds: float, junit: Path, arguments: Sequence[str], paths: Sequence[str]
) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-m", "gpu"]
    done = context.run([*command, f"--junitxml={junit}", *arguments, *paths], seconds, OMP_NUM_THREADS="1")
    result = {"status": verdict(done), "pytest_seconds": done.seconds, **counts(junit)}
    if result["status"] == "ok" and not result.get("passed"):
        result |= {"status": "failed", "reason": "no test ran"}
    if result["status"] != "ok":
        result["tail"] = done.tail[-3000:]
    return result


#: Tests of the loops; all others of tests/gpu are of kernels.
LOOP_TESTS = ("tests/gpu/test_cuda_model.py", "tests/gpu/test_cuda_generation.py")


def tests_of(name: str, paths: Sequence[str], *options: str) -> Callable[[Context, float], dict[str, Any]]:
    """A stage of tests in several processes, reported in <name>.xml."""

    def run(context: Context, seconds: float) -> dict[str, Any]:
        parallel = ["-n", str(context.workers)] if importlib.util.find_spec("xdist") and context.workers > 1 else []
        if context.dry:
            collect = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", *options, *paths]
            done = context.run(collect, seconds)
            return {"status": verdict(done), "tail": done.tail[-300:]}
        junit = context.output / f"{name}.xml"
        return run_pytest(context, seconds, junit, [*parallel, *options, "-k", "not test_large"], paths)

    return run


def large(context: Context, seconds: float) -> dict[str, Any]:
    if context.dry:
        return skipped("dry run")
    return run_pytest(context, seconds, context.output / "large.xml", ["-k", "test_large"], ["tests/gpu"])


def sanitizer(context: Context, seconds: float) -> dict[str, Any]:
    program = find("compute-sanitizer")
    if context.dry or program is None:
        return skipped("dry run" if context.dry else "compute-sanitizer is not installed")
    junit = context.scratch / "sanitizer.xml"
    command = [
        program,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "86",
        "--print-limit",
        "20",
        sys.executable,
        "-m",
        "pytest",
    ]
    command += ["-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", "test_small", f"--junitxml={junit}", "tests/gpu"]
    # Without torch's cache every tensor is an allocation of its own, so that a step beside it is seen.
    done = context.run(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1", OMP_NUM_THREADS="1")
    if "Device not supported" in done.tail:
        return skipped("compute-sanitizer does not support this device or its runtime")
    status = {86: "failed"}.get(done.code or 0, verdict(done))
    return {"status": status, **counts(junit), **({} if status == "ok" else {"tail": done.tail[-3000:]})}
