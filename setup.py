"""Build of lmvae_fast: the folder map of `kernels/` and the C++ extension of `csrc/`. Metadata lives in pyproject.toml.

The extension is one plain shared library, `lmvae_fast/_C.so`, loaded with `torch.ops.load_library`: it has no Python
symbols, so one build serves every Python version, but it belongs to one torch version. What happened is written to
`lmvae_fast/_build_info.json` for `lmvae-fast env`. LMVAE_BUILD_CSRC=0 skips the build, =1 makes its failure an error;
LMVAE_BUILD_JOBS sets the number of compiler processes.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# One set of flags per instruction set; `*_simd.cpp` is compiled once for each and picked at run time (csrc/dispatch.h).
X86_ISAS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": [
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mprefer-vector-width=512",
    ],
}


def package_map() -> dict[str, str]:
    """Every package and its folder: lmvae_fast/** as it is, kernels/** as lmvae_fast.kernels.**."""
    found = {}
    for top, name in (("lmvae_fast", "lmvae_fast"), ("kernels", "lmvae_fast.kernels")):
        for init in sorted((ROOT / top).rglob("__init__.py")):
            folder = init.parent.relative_to(ROOT / top)
            found[".".join([name, *folder.parts])] = str(Path(top, folder))
    return found


class BuildFailed(RuntimeError):
    """The extension cannot be built here; the message says why."""


class Csrc:
    """Compiles csrc/ with one compiler process per core, and only what changed since the last build."""

    def __init__(self, build_dir: Path, machine: str = ""):
        """machine: the processor to compile for, as platform.machine() names it; default this one."""
        try:
            import torch
            from torch.utils import cpp_extension
        except Exception as error:
            raise BuildFailed(f"torch is not importable at build time ({error}); use --no-build-isolation") from error
        self.torch = torch
        self.cxx = (
            shlex.split(os.environ.get("CXX", ""))
            or [c for c in (shutil.which("g++"), shutil.which("clang++")) if c][:1]
        )
        if not self.cxx:
            raise BuildFailed("no C++ compiler: neither CXX is set nor g++ or clang++ on PATH")
        self.build_dir = build_dir
        self.includes = [str(ROOT / "csrc"), *cpp_extension.include_paths()]
        # CUDA's libraries are not linked, whatever this torch carries: they must not be needed to load a package of C++
        self.library_dirs = cpp_extension.library_paths("cpu")
        self.isas = X86_ISAS if (machine or platform.machine()).lower() in ("x86_64", "amd64") else {}

    def flags(self) -> list[str]:
        abi = int(self.torch._C._GLIBCXX_USE_CXX11_ABI)
        return [
            "-std=c++20", "-O3", "-fPIC", "-g0", "-fopenmp", "-fvisibility=hidden", "-fvisibility-inlines-hidden",
            # Rules of arithmetic: no fast-math (Inf and NaN must pass through); a*b+c may fuse, said explicitly.
            "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
            "-Wall", "-Wno-unused-function", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-maybe-uninitialized",
            f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
            *[f"-I{path}" for path in self.includes],
        ]  # fmt: skip

    def units(self) -> list[tuple[Path, Path, list[str]]]:
        """(source, object, command) of every compilation. The order is the link order: when two units emit the same
        inline function the linker keeps the first, which must not be one compiled for a newer CPU."""
        plain, simd = [], []
        for source in sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]):
            (simd if source.stem.endswith("_simd") else plain).append(source)
        out = []
        have = [f"-DLMVAE_HAVE_{isa}" for isa in self.isas]

        def add(source: Path, tag: str, extra: list[str]) -> None:
            obj = self.build_dir / f"{source.stem}{tag}.o"
            out.append(
                (source, obj, [*self.cxx, *self.flags(), *have, *extra, "-MMD", "-c", str(source), "-o", str(obj)])
            )

        for source in plain:
            add(source, "", [])
        for isa, isa_flags in {"DEFAULT": [], **self.isas}.items():
            for source in simd:
                add(
                    source,
                    f".{isa}",
                    [f"-DLMVAE_ISA={isa}", f"-DCPU_CAPABILITY={isa}", f"-DCPU_CAPABILITY_{isa}", *isa_flags],
                )
        return out

    @staticmethod
    def stale(obj: Path, command: list[str]) -> bool:
        """Whether an object is missing, older than a file it was made from, or made by another command."""
        stamp, depfile = obj.with_suffix(".cmd"), obj.with_suffix(".d")
        if not (obj.exists() and stamp.exists() and depfile.exists()) or stamp.read_text() != shlex.join(command):
            return True
        names = depfile.read_text().split(":", 1)[1].replace("\\\n", " ").split()
        made = obj.stat().st_mtime
        return any(not os.path.exists(name) or os.stat(name).st_mtime > made for name in names)

    def compile_one(self, unit: tuple[Path, Path, list[str]]) -> None:
        source, obj, command = unit
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildFailed(
                f"{source.relative_to(ROOT)} does not compile:\n{shlex.join(command)}\n{done.stderr[-4000:]}"
            )
        if done.stderr.strip():
            print(done.stderr, file=sys.stderr)
        obj.with_suffix(".cmd").write_text(shlex.join(command))

    def build(self, target: Path) -> dict:
        """Compile, link to `target`, and return what `_build_info.json` holds."""
        start = time.monotonic()
        self.build_dir.mkdir(parents=True, exist_ok=True)
        units = self.units()
        todo = [unit for unit in units if self.stale(unit[1], unit[2])]
        jobs = int(os.environ.get("LMVAE_BUILD_JOBS", 0)) or len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(self.compile_one, todo))
        libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
        # No -fopenmp here: GOMP_* symbols must come from whichever OpenMP run time this torch already carries, so that
        # torch.set_num_threads governs us too and no second thread pool appears.
        partial = target.with_suffix(".so.partial")
        link = [*self.cxx, "-shared", *[str(u[1]) for u in units], *[f"-L{p}" for p in self.library_dirs], *libraries]
        done = subprocess.run([*link, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise BuildFailed(f"linking failed:\n{done.stderr[-4000:]}")
        os.replace(partial, target)  # a process that has the old library mapped keeps it
        version = subprocess.run([*self.cxx, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
        return {
            "built": True, "reason": "", "torch": self.torch.__version__, "compiler": version,
            "isas": ["DEFAULT", *self.isas], "compiled_units": len(todo),
            "seconds": round(time.monotonic() - start, 1),
        }  # fmt: skip


class BuildCsrc(build_ext):
    """Replaces setuptools' compiler driver by the one above; keeps its rules about where the file goes."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        wanted = os.environ.get("LMVAE_BUILD_CSRC", "")
        try:
            if wanted == "0":
                raise BuildFailed("skipped: LMVAE_BUILD_CSRC=0")
            info = Csrc(ROOT / "build" / "csrc").build(target)
        except BuildFailed as error:
            if wanted == "1":
                raise
            target.unlink(missing_ok=True)  # never leave a library older than its source behind
            info = {"built": False, "reason": str(error)}
            print(f"warning: lmvae_fast builds without its C++ extension: {error}", file=sys.stderr)
        target.with_name("_build_info.json").write_text(json.dumps(info, indent=1) + "\n")
        summary = re.sub(r"\s+", " ", json.dumps(info))
        print(f"lmvae_fast csrc: {summary}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        outputs = [path for path in super().get_outputs() if os.path.exists(path)]
        return [*outputs, str(Path(self.get_ext_fullpath("lmvae_fast._C")).with_name("_build_info.json"))]

    def copy_extensions_to_source(self) -> None:
        """Editable installs: the library and its record go next to the Python sources."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            for path in (built, built.with_name("_build_info.json")):
                if path.exists():
                    copy = ROOT / "lmvae_fast" / path.name
                    shutil.copyfile(path, copy.with_suffix(".new"))
                    os.replace(copy.with_suffix(".new"), copy)


class Wheel(bdist_wheel):
    """A wheel for every Python 3: the extension has no Python symbols. It belongs to a platform, and to one torch version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class WithExtension(Distribution):
    def has_ext_modules(self) -> bool:
        return os.environ.get("LMVAE_BUILD_CSRC", "") != "0"


if __name__ == "__main__":  # as pip and the command line run it; tools/check_aarch64.py imports it for `Csrc`
    packages = package_map()
    setup(
        packages=list(packages),
        package_dir=packages,
        package_data={
            "lmvae_fast": ["_build_info.json", "*.so"],
            "lmvae_fast.kernels.packed_linear": ["choices.json"],
        },
        ext_modules=[Extension("lmvae_fast._C", sources=[])],
        cmdclass={"build_ext": BuildCsrc, "bdist_wheel": Wheel},
        distclass=WithExtension,
    )
