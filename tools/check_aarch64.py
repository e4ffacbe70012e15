"""Compile csrc/ for aarch64 on any machine, as a check that it holds nothing of x86 alone: `make check-aarch64`.

    python tools/check_aarch64.py [--syntax] [--jobs N] [PATTERN ...]

Debian and Ubuntu have the cross compiler: `apt-get install g++-aarch64-linux-gnu` (CXX names another). Only headers of the
installed torch are read; nothing is linked or run. --syntax stops before code is generated; a PATTERN chooses files by a
part of their name. The exit code is 1 when a file does not compile, and 0 with a message where there is no such compiler.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
COMPILER = "aarch64-linux-gnu-g++"


def build_script() -> ModuleType:
    """setup.py as a module: the flags and the list of compilations are its."""
    spec = importlib.util.spec_from_file_location("lmvae_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--syntax", action="store_true", help="only look whether the compiler accepts the files")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    compiler = os.environ.get("CXX") or COMPILER
    if shutil.which(shlex.split(compiler)[-1]) is None:
        print(f"check-aarch64: skipped, there is no {compiler} here (apt-get install g++-aarch64-linux-gnu)")
        return 0
    os.environ["CXX"] = compiler
    with tempfile.TemporaryDirectory(prefix="check_aarch64_") as folder:
        csrc = build_script().Csrc(Path(folder), machine="aarch64")
        units = [u for u in csrc.units() if not options.patterns or any(p in u[0].name for p in options.patterns)]

        def compile_unit(unit: tuple[Path, Path, list[str]]) -> tuple[Path, str]:
            command = [*unit[2], *(["-fsyntax-only"] if options.syntax else [])]
            done = subprocess.run(command, capture_output=True, text=True)
            return unit[0], done.stderr[-6000:] if done.returncode else ""

        failures = 0
        with ThreadPoolExecutor(options.jobs) as pool:
            for source, error in pool.map(compile_unit, units):
                failures += bool(error)
                print(f"{source.relative_to(ROOT)}: {'does not compile' if error else 'ok'}", flush=True)
                if error:
                    print(error, file=sys.stderr)
    print(f"check-aarch64: {len(units)} files, {failures} failures")
    return 1 if failures or not units else 0


if __name__ == "__main__":
    sys.exit(main())
