"""Compile csrc/ for aarch64 on any machine, as a check that it holds nothing of x86 alone: `make check-aarch64`.

    python tools/check_aarch64.py [--syntax] [--optimise LEVEL] [--jobs N] [PATTERN ...]

Debian and Ubuntu have the cross compiler: `apt-get install g++-aarch64-linux-gnu` (CXX names another). Every file is compiled
and assembled, at -O1: what -O3 adds is more of the same instructions, and takes three times as long. Most of the rest went
into torch's headers, which are read once here (a precompiled header). Nothing is linked but one program: what the vector
headers compute (tools/check_vectors.cpp) is run where `qemu-aarch64-static` is installed (`apt-get install qemu-user-static`)
and compared with torch and with the Python definition of the random stream. --syntax stops before code is generated; a
PATTERN chooses files by a part of their name. The exit code is 1 when a file does not compile or a value is wrong, and 0 with
a message where there is no such compiler.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
# What the files that are compiled once include of torch.
HEADERS = ("ATen/core/Tensor.h", "ATen/Parallel.h", "ATen/Dispatch.h", "torch/library.h")


def build_script() -> ModuleType:
    """setup.py as a module: the flags and the list of compilations are its."""
    spec = importlib.util.spec_from_file_location("lmvae_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def precompile(command: Sequence[str], folder: Path) -> list[str]:
    """Torch's headers read once: the flags that take them from there, or none where the compiler cannot."""
    header = folder / "torch_headers.h"
    header.write_text("".join(f"#include <{name}>\n" for name in HEADERS))
    done = subprocess.run(
        [*command, "-x", "c++-header", str(header), "-o", f"{header}.gch"], capture_output=True, text=True
    )
    return ["-include", str(header)] if done.returncode == 0 else []


def wrong_values(printed: str) -> list[str]:
    """What the program of check_vectors.cpp printed and should not have, one line a kind."""
    import torch

    from lmvae_fast.kernels import philox

    found: dict[str, dict[int, float]] = {}
    for line in printed.splitlines():
        name, index, value = line.split()
        found.setdefault(name, {})[int(index)] = float.fromhex(value)
    seed, offset, first = 0x123456789ABCDEF, 0xFEDCBA987, 0xFFFFFFFE
    blocks = torch.arange(first, first + 16)
    words = philox.block_words(torch.tensor(seed), torch.tensor(offset).expand_as(blocks), blocks).reshape(-1)
    a, b = words.view(-1, 2).unbind(-1)
    radius = (-2 * (((a >> 8) + 1).double() * 2**-24).log()).sqrt()
    angle = (b >> 8).double() * (2 * torch.pi * 2**-24)
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).reshape(-1)
    ends = torch.arange(2001, dtype=torch.float32)
    halves = torch.tensor([1.00390625, 1.01171875, 1e-40, 65519.9, 65520.0, 3e38, -2.5, 6e-8])
    turned = {100 * i + j: float(100 * i + j) for i in range(4) for j in range(4)}
    exact = {"word": words, "bfloat16": halves.bfloat16(), "float16": halves.half(), "turned": None}
    near = {
        "normal": (normals, 4e-7),
        "exp": ((-110.0 + 0.125 * ends).double().exp(), 2.4e-7),
        "tanh": ((-8.0 + ends / 128).double().tanh(), 2.4e-7),
    }
    wrong = []
    for name, values in exact.items():
        wanted = turned if values is None else dict(enumerate(values.double().tolist()))
        if found.get(name) != wanted:
            wrong.append(f"{name}: not what it should be, to the bit")
    for name, (values, relative) in near.items():
        ours = torch.tensor([found.get(name, {}).get(i, torch.nan) for i in range(len(values))], dtype=torch.float64)
        finite = values.abs() < torch.finfo(torch.float32).max
        allowed = relative * values.abs().clamp(min=1.0 if name == "normal" else 0.0) + torch.finfo(torch.float32).tiny
        bad = torch.where(finite, ~((ours - values).abs() <= allowed), ours != torch.inf)
        if bad.any():
            place = int(bad.nonzero()[0])
            wrong.append(
                f"{name}: {int(bad.sum())} of {len(values)} are wrong, the first is {ours[place]} for {values[place]}"
            )
    return wrong


def run_vectors(compiler: Sequence[str], includes: Sequence[str], folder: Path, emulator: Sequence[str]) -> list[str]:
    """Compile, run and judge check_vectors.cpp; what is wrong with it."""
    program = folder / "check_vectors"
    flags = ["-std=c++20", "-O2", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-static"]
    flags += ["-DLMVAE_ISA=DEFAULT", *(f"-I{path}" for path in includes)]
    source = str(Path(__file__).with_name("check_vectors.cpp"))
    for command in ([*compiler, *flags, source, "-o", str(program)], [*emulator, str(program)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return [f"{shlex.join(command)[:200]} ended with {done.returncode}: {done.stderr[-4000:]}"]
    return wrong_values(done.stdout)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--syntax", action="store_true", help="only look whether the compiler accepts the files")
    parser.add_argument("--optimise", default="1", metavar="LEVEL", help="0 to 3; the package itself is built with 3")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    compiler = os.environ.get("CXX") or COMPILER
    if shutil.which(shlex.split(compiler)[-1]) is None:
        print(f"check-aarch64: skipped, there is no {compiler} here (apt-get install g++-aarch64-linux-gnu)")
        return 0
    os.environ["CXX"] = compiler
    started = time.monotonic()
    extra = [f"-O{options.optimise}", *(["-fsyntax-only"] if options.syntax else [])]
    with tempfile.TemporaryDirectory(prefix="check_aarch64_") as folder:
        csrc = build_script().Csrc(Path(folder), machine="aarch64")
        units = [u for u in csrc.units() if not options.patterns or any(p in u[0].name for p in options.patterns)]
        headers = (
            precompile([*csrc.cxx, *csrc.flags(), f"-O{options.optimise}"], Path(folder)) if len(units) > 3 else []
        )

        def compile_unit(unit: tuple[Path, Path, list[str]]) -> tuple[Path, str]:
            simd = unit[0].stem.endswith("_simd")  # they read next to nothing of torch
            done = subprocess.run([*unit[2], *extra, *([] if simd else headers)], capture_output=True, text=True)
            return unit[0], done.stderr[-6000:] if done.returncode else ""

        failures = 0
        with ThreadPoolExecutor(options.jobs) as pool:
            for future in as_completed([pool.submit(compile_unit, unit) for unit in units]):
                source, error = future.result()
                failures += bool(error)
                seconds = time.monotonic() - started
                print(
                    f"{seconds:5.0f} s  {source.relative_to(ROOT)}: {'does not compile' if error else 'ok'}", flush=True
                )
                if error:
                    print(error, file=sys.stderr)
        emulator = shutil.which(EMULATOR)
        if emulator is None:
            print(f"the vector headers: not run, there is no {EMULATOR} here (apt-get install qemu-user-static)")
        else:
            wrong = run_vectors(csrc.cxx, csrc.includes, Path(folder), [emulator])
            failures += bool(wrong)
            print(f"the vector headers, run by {EMULATOR}: {'; '.join(wrong) or 'ok'}")
    spent = os.times()
    processor = spent.children_user + spent.children_system
    seconds = time.monotonic() - started
    print(f"check-aarch64: {len(units)} files, {failures} failures, {seconds:.0f} s ({processor:.0f} s of a processor)")
    return 1 if failures or not units else 0


if __name__ == "__main__":
    sys.exit(main())
