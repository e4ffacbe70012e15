"""tools/check_aarch64.py: what the vector headers compute is judged, here as this machine's compiler makes it."""

from __future__ import annotations

import importlib.util
import shutil
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_aarch64", REPOSITORY / "tools" / "check_aarch64.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_aarch64"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["check_aarch64"]


@pytest.fixture(scope="module")
def printed(check, tmp_path_factory):
    """What check_vectors.cpp prints when it is compiled for this machine."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    folder = tmp_path_factory.mktemp("vectors")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "wrong_values", lambda text: seen.append(text) or [])
        assert check.run_vectors(["g++"], check.build_script().Csrc(folder).includes, folder, []) == []
    return seen[0]


def test_the_vector_headers_compute_what_they_should(check, printed):
    assert check.wrong_values(printed) == []


@pytest.mark.parametrize("name", ["word", "normal", "exp", "tanh", "bfloat16", "float16", "turned"])
def test_a_wrong_value_is_named(check, printed, name):
    lines = printed.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith(f"{name} 3 "))
    value = float.fromhex(lines[place].split()[2])
    lines[place] = f"{name} 3 {(value * 1.00001 if value else 1.0).hex()}"
    wrong = check.wrong_values("\n".join(lines))
    assert len(wrong) == 1 and wrong[0].startswith(f"{name}:")
    assert check.wrong_values("\n".join(lines[:place] + lines[place + 1 :]))  # a value that is missing


def test_a_machine_without_the_compiler_is_said(check, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler-g++")
    assert check.main([]) == 0
    assert "skipped" in capsys.readouterr().out


def test_a_file_that_does_not_compile_is_red(check, monkeypatch, capsys, tmp_path):
    """The compiler is one that refuses everything."""
    refusing = tmp_path / "refusing"
    refusing.write_text("#!/bin/sh\necho 'error: no' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("CXX", str(refusing))
    monkeypatch.setattr(check, "EMULATOR", "no-such-emulator")
    assert check.main(["philox"]) == 1
    out = capsys.readouterr()
    assert "csrc/cpu/philox.cpp: does not compile" in out.out and "error: no" in out.err
