"""``lmvae-fast verify``: what is whole is told from what is not, and nothing is changed by looking."""

from __future__ import annotations

import json

import pytest
import torch

from lmvae_fast.errors import DataError
from lmvae_fast.generation.latent_files import write_latents
from lmvae_fast.testing import make_model
from lmvae_fast.training.checkpoints import folder as checkpoint
from lmvae_fast.verification import verify
from tests.cli.test_cli import as_json, call
from tests.training.helpers import StopAt, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "model"
    make_model("gpt2", latent_dim=4, max_len=8).save_pretrained(path, include_frozen=True)
    return path


def flip(path, place=-5):
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(bytes(content))


def test_a_model(capsys, folder):
    found = as_json(capsys, "verify", folder)
    assert found["kind"] == "model" and found["good"] and len(found["checks"]) == 3
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    flip(weights)
    out, _ = call(capsys, "verify", folder, "--json", code=3)
    assert not json.loads(out)["good"] and "sha256" in out
    assert "NOT" in call(capsys, "verify", folder, code=3)[0]
    weights.write_bytes(whole)


def test_a_run_and_its_checkpoints(capsys, tmp_path):
    run(tmp_path / "run", StopAt(5), save_every=2)
    found = as_json(capsys, "verify", tmp_path / "run")
    assert found["kind"] == "run" and found["good"], found
    newest = checkpoint.complete(tmp_path / "run" / "checkpoints")[0]
    assert verify(newest).good
    flip(newest / "model.safetensors")
    assert not verify(newest).good and not verify(tmp_path / "run").good
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": "x"}\n')
    assert [check.name for check in verify(tmp_path / "run").checks if not check.good][-1] == "records"


@pytest.mark.parametrize(
    "change",
    [
        {"step": 10**9}, {"step": "3"}, {"step": True}, {"tokens": -1}, {"seconds": "x"}, {"best": {"step": 3}}, {"window": []},
        {"extra": 1}, {"waited": None},
    ],
)  # fmt: skip
def test_a_state_that_fits_its_hash_and_cannot_be(tmp_path, change):
    run(tmp_path / "run", StopAt(3), save_every=3)
    newest = checkpoint.complete(tmp_path / "run" / "checkpoints")[0]
    state = json.loads((newest / checkpoint.STATE).read_text())
    state["progress"] |= change
    (newest / checkpoint.STATE).write_text(json.dumps(state))
    marker = json.loads((newest / checkpoint.MARKER).read_text())
    size = (newest / checkpoint.STATE).stat().st_size
    marker["files"][checkpoint.STATE] = {"bytes": size, "sha256": checkpoint.sha256_file(newest / checkpoint.STATE)}
    (newest / checkpoint.MARKER).write_text(json.dumps(marker))
    assert not verify(newest).good
    from lmvae_fast.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"state\.json"):
        run(tmp_path / "run", resume=True)


def test_latents(capsys, tmp_path):
    write_latents(tmp_path / "z.npy", torch.randn(9, 4))
    found = as_json(capsys, "verify", tmp_path / "z.npy")
    assert found["good"] and "9 rows of 4" in found["checks"][0]["found"]
    call(capsys, "verify", tmp_path / "z.npy", "--latent-dim", "5", code=3)
    write_latents(tmp_path / "nan.safetensors", torch.full((2, 4), float("nan")))
    assert not verify(tmp_path / "nan.safetensors").good


def test_texts(capsys, folder, tmp_path):
    output = tmp_path / "out.jsonl"
    call(capsys, "generate", folder, "--prior", "20", "--batch-size", "1", "--output", output)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert verify(output).good and {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:9]))
    assert "not complete" in verify(output).checks[-1].found
    output.write_bytes(b"".join(lines).replace(b'"index": 3,', b'"index": 4,'))
    assert "block 1" in verify(output).checks[-1].found


def test_a_conversion(capsys, folder, tmp_path):
    call(capsys, "convert", folder, tmp_path / "langvae", "--to", "langvae")
    assert verify(tmp_path / "langvae").good


def test_what_cannot_be_verified(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "none"):
        with pytest.raises(DataError):
            verify(path)
