""".ci/run gives its run a machine that holds nothing: new folders, removed at the end, and only pip's settings kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FOLDERS = (
    "HOME", "TMPDIR", "RAY_TMPDIR", "HF_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME",
    "XDG_RUNTIME_DIR",
)  # fmt: skip
GONE = ("HF_HUB_CACHE", "HF_TOKEN", "TORCH_HOME", "TRITON_CACHE_DIR", "RAY_ADDRESS", "PYTHONPATH")

# stands for make: notes its target, its environment and what the folders hold, and leaves something in each
MAKE = f"""#!{sys.executable}
import json, os, pathlib, signal, sys
folders = {FOLDERS!r}
listed = {{name: sorted(os.listdir(os.environ[name])) for name in folders}}
pip = [p.read_text() for name in ("HOME", "XDG_CONFIG_HOME") for p in pathlib.Path(os.environ[name]).rglob("pip.conf")]
with open(os.environ["NOTES"], "a") as notes:
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    print(json.dumps([sys.argv[1:], dict(os.environ), listed, pip, ignored]), file=notes)
for name in folders:
    (pathlib.Path(os.environ[name]) / "left").write_text("something")
if os.environ["THEN"] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (open(os.environ["NOTES"], "a").write("ended"), os._exit(1)))
    os.write(int(os.environ["READY"]), b"x")
    while True:
        signal.pause()
sys.exit(int(os.environ["THEN"]) if sys.argv[1] == "test" else 0)
"""


@pytest.fixture
def start(tmp_path):
    """Starts .ci/run with a stand-in for make, in a home with settings of pip, caches and variables that lead to them."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "make").write_text(MAKE)
    (tmp_path / "bin" / "make").chmod(0o755)
    home = tmp_path / "home"
    for place in (".config/pip", ".pip", ".cache/huggingface", ".pyenv", ".ray"):
        (home / place).mkdir(parents=True)
    (home / ".config" / "pip" / "pip.conf").write_text("[global]\ntimeout = 7\n")
    (home / ".pip" / "pip.conf").write_text("[global]\nretries = 8\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "PYENV"))}
    environment |= {name: str(tmp_path / "elsewhere") for name in GONE}
    environment |= {
        "HOME": str(home), "PATH": f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin", "PIP_CERT": "/some/file",
        "NOTES": str(tmp_path / "notes"),
    }  # fmt: skip

    def run(then, **options):
        command = [REPOSITORY / ".ci" / "run"]
        return subprocess.Popen(command, env={**environment, "THEN": str(then), **options.pop("env", {})}, **options)

    return run


def notes(tmp_path):
    return [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines() if line.startswith("[")]


def test_a_run_begins_with_empty_folders_and_leaves_none(start, tmp_path):
    assert start(0).wait() == 0
    lint, test = notes(tmp_path)
    assert (lint[0], test[0]) == (["lint"], ["test"])
    given = lint[1]
    places = [Path(given[name]) for name in FOLDERS]
    assert len(set(places)) == len(places) and len({place.parent for place in places}) == 1
    assert not any(place.exists() for place in places) and not places[0].parent.exists()
    assert len(given["RAY_TMPDIR"]) < 40, "Ray's sockets would have paths that are too long"
    assert lint[2] == {
        name: ["pip"] if name == "XDG_CONFIG_HOME" else [".pip"] if name == "HOME" else [] for name in FOLDERS
    }
    assert not set(GONE) & set(given)
    assert not lint[4], "tests that send interrupts would wait for ever"


def test_the_package_client_keeps_its_settings(start, tmp_path):
    assert start(0).wait() == 0
    given, settings = notes(tmp_path)[0][1], notes(tmp_path)[0][3]
    assert sorted(settings) == ["[global]\nretries = 8\n", "[global]\ntimeout = 7\n"]
    assert given["PIP_CERT"] == "/some/file"
    assert given["PYENV_ROOT"] == str(tmp_path / "home" / ".pyenv")
    assert given["PATH"].startswith(str(tmp_path / "bin"))


def test_a_red_target_is_a_red_run(start, tmp_path):
    assert start(3).wait() == 3
    assert [each[0] for each in notes(tmp_path)] == [["lint"], ["test"]]
    assert not Path(notes(tmp_path)[0][1]["HOME"]).exists()


def test_a_run_that_is_stopped_leaves_nothing(start, tmp_path):
    ready, told = os.pipe()
    run = start("wait", pass_fds=[told], env={"READY": str(told)})
    assert os.read(ready, 1) == b"x"
    run.send_signal(signal.SIGTERM)
    assert run.wait() == 143
    assert (tmp_path / "notes").read_text().endswith("ended"), "what it started was left running"
    assert not Path(notes(tmp_path)[0][1]["HOME"]).exists()
    os.close(ready)
    os.close(told)
