"""Model folders: written, loaded, and refused where they are foreign or damaged."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lmvae_fast as lf
from lmvae_fast.errors import (
    CheckpointError,
    OutputError,
)
from lmvae_fast.testing import make_model

TEXTS = ["a cat is a kind of animal", "dogs eat meat", "water boils", "the sun is a star"]


@pytest.mark.parametrize("options", [{}, {"system": "optimus"}, {"projector": "mlp", "embedding_shift": True}])
def test_saving_and_loading(tmp_path, options):
    model = make_model("llama", **options).eval()
    model.save_pretrained(tmp_path / "m")
    again = lf.LMVAE.from_pretrained(tmp_path / "m")
    eps = torch.randn(4, 6)
    a, b = (each(TEXTS, beta=1.0, eps=eps).loss for each in (model, again))
    assert torch.equal(a, b)
    assert not again.training
    model.save_pretrained(tmp_path / "m")  # replaces its own
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
    assert "lf.LMVAE.from_pretrained" in (tmp_path / "m" / "README.md").read_text()


def test_folders_that_are_no_model_of_ours(tmp_path):
    model = make_model("gpt2")
    folder = tmp_path / "m"
    model.save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        lf.LMVAE.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="sha256"):
        lf.LMVAE.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "latent_dim": 7}))
    with pytest.raises(CheckpointError, match="shape"):
        lf.LMVAE.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "colour": "blue"}))
    with pytest.raises(CheckpointError, match="colour"):
        lf.LMVAE.from_pretrained(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no lmvae_fast model"):
        lf.LMVAE.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="remedy"):
        lf.LMVAE.from_pretrained("nobody/nothing-here")
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("keep")
    with pytest.raises(OutputError, match="nor a model of ours"):
        model.save_pretrained(other)
    assert (other / "precious.txt").read_text() == "keep"
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="writable"):
        model.save_pretrained(tmp_path / "file" / "m")
    with pytest.raises(OutputError, match="is no folder"):
        model.save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_parts_that_are_damaged_or_lack_weights(tmp_path, part):
    folder = tmp_path / "m"
    make_model("gpt2").save_pretrained(folder)
    file = folder / part / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("weight") and "pooler" not in name)
    save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 missing"):
        lf.LMVAE.from_pretrained(folder)
    save_file({**tensors, name: torch.cat([tensors[name]] * 2)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=part):
        lf.LMVAE.from_pretrained(folder)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=part):
        lf.LMVAE.from_pretrained(folder)


@pytest.mark.parametrize("listed", [True, False])  # as now, and as before folders listed their files
def test_a_file_of_the_users_within_a_part_keeps_the_folder(tmp_path, listed):
    model = make_model("gpt2")
    folder = tmp_path / "m"
    model.save_pretrained(folder)
    if not listed:
        config = json.loads((folder / "config.json").read_text())
        del config["files"]
        (folder / "config.json").write_text(json.dumps(config))
    model.save_pretrained(folder)
    (folder / "decoder" / "deep").mkdir()
    for name in ("decoder/notes.txt", "decoder/deep/notes.txt"):
        (folder / name).write_text("mine")
        with pytest.raises(OutputError, match="holds something that was not written with it") as told:
            model.save_pretrained(folder)
        assert told.value.value == name and (folder / name).read_text() == "mine"
        (folder / name).unlink()
    (folder / "decoder" / "deep").rmdir()
    model.save_pretrained(folder)
