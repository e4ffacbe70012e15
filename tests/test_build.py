"""pip's build path on a machine without torch at build time: a wheel without the extension, which says why and runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]
BUILD = (
    "import sys; sys.path[:0] = sys.argv[1:2]\n"
    "from setuptools import build_meta\n"
    "print(build_meta.build_wheel(sys.argv[2]))\n"
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The sources, and setuptools by itself: what pip's isolated build sees."""
    root = tmp_path_factory.mktemp("build")
    source, tools = root / "source", root / "tools"
    for name in ("lmvae_fast", "kernels", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    packages = Path(setuptools.__file__).parents[1]
    tools.mkdir()
    for place in (packages / "setuptools", packages / "_distutils_hack", *packages.glob("setuptools-*.dist-info")):
        (tools / place.name).symlink_to(place)
    (root / "out").mkdir()
    return root


def build(tree: Path, wanted: str) -> subprocess.CompletedProcess[str]:
    # -I -S: nothing of this environment is on the path but the standard library.
    command = [sys.executable, "-I", "-S", "-c", BUILD, str(tree / "tools"), str(tree / "out")]
    environment = {**os.environ, "LMVAE_BUILD_CSRC": wanted}
    return subprocess.run(command, cwd=tree / "source", env=environment, capture_output=True, text=True)


def test_without_torch_a_wheel_is_built_that_says_what_it_lacks(tree):
    done = build(tree, "")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "builds without its C++ extension: torch is not importable at build time" in done.stderr
    wheel = tree / "out" / done.stdout.splitlines()[-1]
    assert "-py3-none-" in wheel.name and "linux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = json.loads(archive.read("lmvae_fast/_build_info.json"))
        metadata = next(archive.read(name).decode() for name in names if name.endswith("METADATA"))
        archive.extractall(tree / "installed")
    assert info["built"] is False and "--no-build-isolation" in info["reason"]
    assert "Requires-Dist: torch>=2.11" in metadata
    assert not any(name.endswith(".so") or name.startswith(("tests/", "kernels/", "benchmarks/")) for name in names)
    here = {f"lmvae_fast/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")} | {
        str(path.relative_to(ROOT)) for path in (ROOT / "lmvae_fast").rglob("*.py")
    }
    assert here <= names, sorted(here - names)[:5]
    code = (
        "import torch; from lmvae_fast.kernels import backend, posterior; print(posterior.__file__)\n"
        "print(posterior.posterior_sample(torch.zeros(2, 3), torch.zeros(2, 3), seed=0)[1].tolist())\n"
        "print([row.reason for row in backend.report() if row.op == 'posterior_sample' and row.backend == 'cpp'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree / "installed")},
    )  # fmt: skip
    place, kl, reason = run.stdout.splitlines() if run.returncode == 0 else (run.stderr, "", "")
    assert str(tree / "installed") in place and kl == "[0.0, 0.0]" and "torch is not importable" in reason, place


def test_an_extension_that_was_asked_for_is_an_error_without_torch(tree):
    done = build(tree, "1")
    assert done.returncode != 0 and "torch is not importable at build time" in done.stderr
