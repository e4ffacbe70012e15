"""``make test-peers``: our classes by LangVAE's names have the real ones' arguments, in their order, with their defaults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.langvae_environment import langvae_python

pytestmark = pytest.mark.peers


def test_arguments_are_langvaes(tmp_path):
    sides = []
    for python, more in ((langvae_python(), []), (sys.executable, ["--ours"])):
        output = tmp_path / f"{len(sides)}.json"
        script = Path(__file__).with_name("signatures.py")
        run = subprocess.run(
            [str(python), str(script), str(output), *more], capture_output=True, text=True, cwd=tmp_path
        )
        assert run.returncode == 0, run.stderr[-2000:]
        sides.append(json.loads(output.read_text()))
    theirs, ours = sides
    assert theirs.keys() == ours.keys() and len(theirs) > 20
    for name, arguments in theirs.items():
        count = len(arguments)
        if arguments and arguments[0][2] == "FIELD":
            assert sorted(ours[name]) == sorted(arguments), name
            continue
        # What is ours beside theirs is given by name alone.
        assert [given[0] for given in ours[name][:count]] == [given[0] for given in arguments], name
        assert all(kind in ("KEYWORD_ONLY", "VAR_KEYWORD") for _, _, kind in ours[name][count:]), name
        for (argument, default, _), (_, wanted, _) in zip(ours[name], arguments, strict=False):
            # An argument that must be given there may have a default here, which is an error of its own.
            assert default == wanted or wanted == "", (name, argument, default, wanted)
