"""No command deletes or overwrites what it did not make, and it says so before any work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lmvae_fast import files, temporaries
from lmvae_fast.errors import OutputError
from lmvae_fast.testing import make_model
from lmvae_fast.training.run_checks import RUN
from tests.cli.test_cli import call
from tests.training.helpers import StopAt, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("owned") / "model"
    make_model("gpt2", latent_dim=4, max_len=8).save_pretrained(path)
    return path


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


@pytest.fixture
def mine(tmp_path):
    """A folder of the user's, and a run of ours."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    run(tmp_path / "run", StopAt(3), save_every=2)
    return tmp_path


COMMANDS = {
    "to langvae": ["convert", "MODEL", "TARGET", "--to", "langvae", "--overwrite"],
    "to ours": ["convert", "MODEL", "TARGET", "--overwrite"],
    "demo": ["demo", "--output", "TARGET", "--steps", "1"],
    "profile train": ["profile", "train", "--tiny", "--output", "TARGET"],
    "profile generate": ["profile", "generate", "--tiny", "--output", "TARGET"],
    "train": ["train", "--data", "corpus", "--encoder", "none", "--decoder", "none", "--output", "TARGET"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_of_another_kind_is_left_alone(capsys, folder, mine, name):
    for target in ("mine", "run") if name != "train" else ("mine",):
        before = contents(mine)
        given = {"MODEL": folder, "TARGET": mine / target}
        _, told = call(capsys, *[given.get(word, word) for word in COMMANDS[name]], code=3)
        assert "left alone" in told, told
        assert contents(mine) == before


def test_a_foreign_model_in_a_run_is_refused_before_training(capsys, mine):
    (mine / "run" / "model").mkdir()
    (mine / "run" / "model" / "notes").write_text("mine")
    before = contents(mine)
    words = [
        "train",
        "--data",
        "corpus",
        "--encoder",
        "none",
        "--decoder",
        "none",
        "--resume",
        "--output",
        mine / "run",
    ]
    assert "left alone" in call(capsys, *words, code=3)[1]
    assert contents(mine) == before


def test_a_model_with_something_beside_it_is_not_replaced(folder, tmp_path):
    model = make_model("gpt2", latent_dim=4, max_len=8)
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "notes").write_text("mine")
    with pytest.raises(OutputError, match="would be replaced"):
        model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "notes").read_text() == "mine"


def test_a_conversion_replaces_what_a_conversion_wrote(capsys, tmp_path):
    make_model("gpt2", latent_dim=4, max_len=8).save_pretrained(tmp_path / "model", include_frozen=True)
    words = ["convert", tmp_path / "model", tmp_path / "langvae", "--to", "langvae"]
    call(capsys, *words)
    assert "exists" in call(capsys, *words, code=3)[1]
    call(capsys, *words, "--overwrite")
    assert files.made_as(tmp_path / "langvae") == "LangVAE checkpoint"
    before = contents(tmp_path)
    for target in (tmp_path / "model", tmp_path):  # itself, and what it lies in
        call(capsys, "convert", tmp_path / "model", target, "--overwrite", code=3)
    assert contents(tmp_path) == before


def test_records_without_checkpoints_are_kept(mine):
    """Training afresh would cut them; resumed, they are put aside."""
    log = mine / "run" / "metrics.jsonl"
    log.write_text('{"step": 1}\n')
    for path in (mine / "run" / "checkpoints").iterdir():
        temporaries.remove(path)
    with pytest.raises(OutputError, match="records of a run"):
        run(mine / "run")
    assert log.read_text() == '{"step": 1}\n'
    run(mine / "run", StopAt(1), resume=True)
    assert (mine / "run" / "aside-metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_run_of_before_folders_were_marked_is_continued(mine):
    (mine / "run" / files.MARK).unlink()
    assert run(mine / "run", resume=True).step == 24
    assert files.made_as(mine / "run") == RUN


def test_one_training_at_a_time(mine):
    with files.locked(mine / "run", "a training run"), pytest.raises(OutputError, match="another process"):
        run(mine / "run", resume=True)
    assert run(mine / "run", resume=True).step == 24


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_a_terminal_that_goes_away_leaves_a_checkpoint(tmp_path):
    class Hangup(StopAt):
        def on_step(self, run):
            if run.step == 5:
                os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what was started under nohup ignores it, and so do its runs
    try:
        result = run(tmp_path / "run", Hangup())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.stop_reason, result.step, result.interrupted) == ("SIGHUP", 5, True)
    assert run(tmp_path / "run", resume=True).step == 24


GENERATE = """
import os, signal, sys
from lmvae_fast.generation import text_files
append = text_files.BlockHashes.append
def once(self, block):
    append(self, block)
    os.kill(os.getpid(), signal.SIGTERM)
text_files.BlockHashes.append = once
sys.argv = ["lmvae-fast", *sys.argv[1:]]
from lmvae_fast.cli.app import main
main()
"""


def test_sigterm_ends_generate_behind_its_block_with_130(capsys, folder, tmp_path):
    words = ["generate", folder, "--prior", "40", "--batch-size", "2", "--output"]
    command = [sys.executable, "-c", GENERATE, *map(str, words), str(tmp_path / "out.jsonl"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr[-2000:]
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 16
    call(capsys, *words, tmp_path / "out.jsonl")
    call(capsys, *words, tmp_path / "whole.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_drawings_of_others_are_left_alone(capsys, folder, tmp_path):
    pytest.importorskip("matplotlib")
    words = ["interpolate", folder, "a cat", "water", "--steps", "3", "--output"]
    for name in ("way.html", "way.png"):
        (tmp_path / name).write_text("mine")
        assert "left alone" in call(capsys, *words, tmp_path / name, code=3)[1]
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
        for _ in range(2):  # the second replaces the first
            call(capsys, *words, tmp_path / name)


def test_the_mark_is_json(mine):
    assert json.loads((mine / "run" / files.MARK).read_text())["kind"] == RUN
