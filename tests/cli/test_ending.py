"""However a command ends: a message and an exit code, never a traceback; JSON and nothing else where JSON is asked for."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lmvae_fast.cli import ending, main
from lmvae_fast.cli.common import documents_only, print_json
from lmvae_fast.errors import DataError, OutputError
from lmvae_fast.exploration.operations import parse_terms
from lmvae_fast.generation.latent_files import write_latents
from lmvae_fast.testing import make_model
from tests.cli.test_cli import call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ending") / "model"
    make_model("gpt2", latent_dim=4, max_len=12).save_pretrained(path)
    return path


def ends(capsys, error, as_json=False):
    """(exit code, standard error) of a command that raises."""
    with pytest.raises(SystemExit) as end, ending.ending(as_json):
        raise error
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OutputError("no room", remedy="make some"), 3, "no room"),
        (PermissionError(13, "Permission denied", "/x/[red]y"), 3, "/x/[red]y"),
        (OSError(28, "No space left on device"), 3, "No space left"),
        (MemoryError(), 3, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 3, "out of memory"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), 3, "encoding"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyError("[/x]"), 70, "[/x]"),
        (ValueError("half \udcff"), 70, "fault of lmvae_fast"),
        (RecursionError("too deep"), 70, "too deep"),
    ],
)
def test_every_error_has_an_exit_code(capsys, tmp_path, monkeypatch, error, code, message):
    monkeypatch.setenv("LMVAE_CACHE", str(tmp_path))
    assert ends(capsys, error)[0] == code
    found, told = ends(capsys, error, as_json=True)
    assert found == code and isinstance(json.loads(told), dict)
    told = ends(capsys, error)[1]
    assert message in told and "Traceback" not in told
    logs = list((tmp_path / "logs").glob("fault-*.log")) if (tmp_path / "logs").exists() else []
    assert bool(logs) == (code == 70)
    if logs:
        assert any(str(log) in told for log in logs) and "Traceback" in logs[0].read_text()


def test_a_fault_whose_log_cannot_be_saved_is_told_all_the_same(capsys, monkeypatch):
    monkeypatch.setenv("LMVAE_CACHE", "/proc/none")
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/proc/none")
    code, told = ends(capsys, ZeroDivisionError("x"))
    assert code == 70 and "could not be saved" in told


def test_telling_an_error_never_fails(monkeypatch):
    class Gone:
        encoding = "utf-8"

        def write(self, text):
            raise OSError(28, "No space left on device")

        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Gone())
    for as_json in (False, True):
        for error in (OutputError("x"), KeyError("x"), KeyboardInterrupt()):
            with pytest.raises(SystemExit), ending.ending(as_json):
                raise error


def test_json_and_nothing_else(capsys):
    with documents_only(True):
        print("chatter of a library")
        print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": "\udcff"})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": None, "b": [None, 1.5], "c": "\udcff"} and "chatter" in err


def test_usage_is_told_as_json_too(capsys):
    for words in (["nonsense"], ["generate"], ["traverse", "m", "t", "--steps", "x"]):
        err = call(capsys, *words, "--json", code=2)[1]
        assert json.loads(err)["error"] == "Usage"


@pytest.mark.parametrize("name", ["[/x]", "[red]b", ":smile:", "\udcff", "a\nb"])
def test_paths_are_printed_as_they_are(capsys, folder, tmp_path, name):
    ending.prepare_streams()
    write_latents(tmp_path / "z.npy", torch.zeros(2, 4))
    output = tmp_path / f"{name}.jsonl"
    words = ["generate", folder, "--latents", tmp_path / "z.npy", "--output", output]
    out = call(capsys, *words)[0]
    assert output.is_file() and (name in out or "\\udcff" in out)
    assert name.encode("utf-8", "backslashreplace") in call(capsys, "verify", output)[0].encode(
        "utf-8", "backslashreplace"
    )
    call(capsys, "verify", tmp_path / f"{name}.npy", code=3)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a \udcff b", 3),
        ("<|endoftext|>", None),
        ("", 3),
        ("   ", 3),
        ("[/x] [red]", 0),
        ("a" * 20000, 0),
        ("\0", None),
    ],
)
def test_sentences_of_every_kind(capsys, monkeypatch, folder, text, code):
    monkeypatch.setattr(sys, "argv", ["lmvae-fast", "average", str(folder), text, "a cat"])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code or 0) in ((0, 3) if code is None else (code,)), capsys.readouterr().err
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "expression",
    [
        " " * 20000,
        "a" + " " * 20000 + "b",
        "'" * 20000,
        "1" * 20000,
        "1 " * 10000,
        "a - " * 5000,
        '" - ' * 5000,
        "'a' - " * 3000,
    ],
)
def test_sums_are_parsed_in_linear_time(expression):
    started = time.process_time()
    with contextlib.suppress(DataError):
        parse_terms(expression)
    assert time.process_time() - started < 2


CASES = {
    "full": (["env"], ">/dev/full", 3, "No space left"),
    "full json": (["env", "--json"], ">/dev/full", 3, "OutputError"),
    "closed": (["env"], ">&-", 0, ""),
    "gone": (["env"], "| head -c 1 >/dev/null", 0, ""),
    "bytes": (["generate", "$'\\xff\\xfe'", "--prior", "2"], "", 3, "remedy"),
}


@pytest.mark.parametrize("name", CASES)
def test_output_that_takes_nothing(name):
    words, where, code, message = CASES[name]
    line = f"set -o pipefail; {sys.executable} -m lmvae_fast.cli {' '.join(words)} {where}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, errors="replace")
    assert done.returncode == code, done.stderr[-2000:]
    assert message in done.stderr and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


INTERRUPTS = """
import os, signal, sys
from lmvae_fast.generation import text_files
append = text_files.BlockHashes.append
number = getattr(signal, sys.argv[1])
def once(self, block):
    append(self, block)
    os.kill(os.getpid(), number)
text_files.BlockHashes.append = once
sys.argv = ["lmvae-fast", *sys.argv[2:]]
from lmvae_fast.cli.app import main
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_command_prints_json_and_nothing_else(folder, tmp_path, name):
    assert hasattr(signal, name)
    words = ["generate", folder, "--prior", "40", "--batch-size", "2", "--output", tmp_path / "out.jsonl", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTS, name, *map(str, words)], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 130, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert not done.stdout or isinstance(json.loads(done.stdout), dict)
    told = done.stdout if name == "SIGTERM" else done.stderr.splitlines()[-1]
    assert json.loads(told)
