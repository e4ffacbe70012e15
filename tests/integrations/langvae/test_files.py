"""LangVAE's checkpoint files: round trip, atomic writing, and a typed error for every way they can be bad."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import sys

import pytest
import torch

from lmvae_fast import files
from lmvae_fast.errors import CheckpointError, OutputError
from lmvae_fast.files import MARK, TEMPORARY
from lmvae_fast.integrations.langvae import files as langvae_files
from lmvae_fast.integrations.langvae import load_reference
from lmvae_fast.integrations.langvae.files import FILES, LangVAEFolder, read_folder, write_folder
from lmvae_fast.integrations.langvae.legacy_parts import write_legacy_copy
from lmvae_fast.testing import tiny_decoder, tiny_encoder, tiny_tokenizer

NZ, MAX_LEN, LAYERS, WIDTH = 4, 5, 2, 24  # encoder width 24: the tiny encoder's
ROWS = 2 * 2 * 8 * (MAX_LEN + 1)  # K and V, 2 kv heads of 8 (the tiny Llama's)


def contents(**changes) -> LangVAEFolder:
    fields = {
        "latent_dim": NZ,
        "max_len": MAX_LEN,
        "encoder_path": "some/encoder",
        "decoder_path": "some-decoder",
        "posterior_weight": torch.randn(2 * NZ, WIDTH),
        "projector_weight": torch.randn(LAYERS, ROWS, NZ),
        "projector_bias": torch.randn(LAYERS, ROWS),
        "pooling": "last",
        "normalize": True,
        "encoder_class": "AutoModel",
    }
    return LangVAEFolder(**{**fields, **changes})


@pytest.fixture
def saved(tmp_path):
    return write_folder(contents(), tmp_path / "model")


def edit(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def test_round_trip(tmp_path):
    original = contents()
    folder = write_folder(original, tmp_path / "deep" / "model")
    assert sorted(os.listdir(folder)) == sorted([*FILES, MARK])
    got = read_folder(folder)
    for field in dataclasses.fields(LangVAEFolder):
        want, value = getattr(original, field.name), getattr(got, field.name)
        assert torch.equal(want, value) if isinstance(want, torch.Tensor) else want == value, field.name
    assert os.listdir(folder.parent) == ["model"], "no temporary folder may stay"
    version = json.loads((folder / "environment.json").read_text())["python_version"]
    assert version == f"{sys.version_info[0]}.{sys.version_info[1]}"


def test_decoder_file_holds_each_layer_once(saved):
    assert (saved / "decoder.pt").stat().st_size < 1.2 * LAYERS * ROWS * (NZ + 1) * 4 + 4096


def test_conditional_projector_reads_labels_too(tmp_path):
    wide = contents(conditional=True, projector_weight=torch.randn(LAYERS, ROWS, NZ + 3))
    assert read_folder(write_folder(wide, tmp_path / "m")).projector_weight.shape[-1] == NZ + 3
    with pytest.raises(CheckpointError, match=r"decoder\.pt is not the decoder"):
        read_folder(write_folder(dataclasses.replace(wide, conditional=False), tmp_path / "n"))


def test_model_paths(tmp_path, saved, monkeypatch):
    """Relative to the checkpoint first, then to the working directory; a hub name stays as it is."""
    assert read_folder(saved).encoder_path == "some/encoder"
    (saved.parent / "parts").mkdir()
    edit(saved / "encoder_cfg.json", model_path="../parts")
    assert read_folder(saved).encoder_path == str(saved.parent / "parts")
    (tmp_path / "elsewhere" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    edit(saved / "encoder_cfg.json", model_path="here")
    assert read_folder(saved).encoder_path == str(tmp_path / "elsewhere" / "here")
    edit(saved / "encoder_cfg.json", model_path="./gone")
    with pytest.raises(CheckpointError, match=r"encoder folder named in encoder_cfg\.json.*\./gone.*pass encoder="):
        read_folder(saved)
    assert read_folder(saved, encoder="other/encoder").encoder_path == "other/encoder"


class TestBadFolders:
    def test_absent(self, tmp_path):
        with pytest.raises(CheckpointError, match="no such checkpoint folder"):
            read_folder(tmp_path / "nothing")

    @pytest.mark.parametrize("name", FILES)
    def test_missing_file(self, saved, name):
        (saved / name).unlink()
        with pytest.raises(CheckpointError, match=f"missing {name}"):
            read_folder(saved)

    def test_pickled_pythae_model_is_named_and_not_opened(self, saved):
        (saved / "decoder.pt").unlink()
        (saved / "decoder.pkl").write_bytes(b"x")
        with pytest.raises(CheckpointError, match=r"found decoder\.pkl.*never loaded"):
            read_folder(saved)

    @pytest.mark.parametrize("name", ["encoder.pt", "decoder.pt"])
    @pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
    def test_truncated_weights(self, saved, name, keep):
        data = (saved / name).read_bytes()
        (saved / name).write_bytes(data[: int(keep * len(data))])
        with pytest.raises(CheckpointError, match=f"{name} is truncated, corrupt"):
            read_folder(saved)

    def test_code_in_a_weight_file_is_never_run(self, saved, tmp_path):
        class Payload:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "ran"),))

        for write in (
            lambda p: torch.save({"linear.weight": Payload()}, p),
            lambda p: p.write_bytes(pickle.dumps(Payload(), protocol=2)),
        ):
            write(saved / "encoder.pt")
            with pytest.raises(CheckpointError, match="nothing is unpickled"):
                read_folder(saved)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
    def test_bad_json(self, saved, text):
        (saved / "decoder_cfg.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError, match=r"decoder_cfg\.json"):
            read_folder(saved)

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("model_config.json", {"latent_dim": None}, "latent_dim"),
            ("model_config.json", {"latent_dim": "16"}, "latent_dim"),
            ("model_config.json", {"latent_dim": True}, "latent_dim"),
            ("model_config.json", {"latent_dim": NZ + 1}, "contradicts"),
            ("decoder_cfg.json", {"max_len": 0}, "out of range"),
            ("decoder_cfg.json", {"max_len": MAX_LEN + 1}, "not the decoder"),
            ("decoder_cfg.json", {"conditional": 1}, "conditional"),
            ("decoder_cfg.json", {"model_path": 3}, "model_path"),
            ("encoder_cfg.json", {"latent_size": NZ - 1}, "contradicts"),
            ("encoder_cfg.json", {"automodel_preset": None}, "automodel_preset"),
            ("encoder_cfg.json", {"automodel_preset": {"pooling_method": "max"}}, "unknown pooling_method"),
            ("encoder_cfg.json", {"automodel_preset": {"cls": "AutoModelForCausalLM"}}, "unknown cls"),
        ],
    )
    def test_bad_field(self, saved, name, changes, message):
        edit(saved / name, **changes)
        with pytest.raises(CheckpointError, match=message):
            read_folder(saved)

    @pytest.mark.parametrize(
        "state",
        [
            {},
            {"linear.weight": torch.zeros(2 * NZ - 1, WIDTH)},
            {"linear.weight": torch.zeros(2 * NZ)},
            {"weight": torch.zeros(2 * NZ, WIDTH)},
            {"linear.weight": torch.zeros(2 * NZ, WIDTH), "linear.bias": torch.zeros(2 * NZ)},
            {"linear.weight": torch.full((2 * NZ, WIDTH), float("nan"))},
            {"linear.weight": 1.0},
        ],
    )
    def test_foreign_encoder(self, saved, state):
        torch.save(state, saved / "encoder.pt")
        with pytest.raises(CheckpointError, match=r"encoder\.pt"):
            read_folder(saved)

    @pytest.mark.parametrize("change", ["gap", "rows", "bias", "extra", "ragged"])
    def test_foreign_decoder(self, saved, change):
        state = torch.load(saved / "decoder.pt", weights_only=True)
        if change == "gap":
            state = {name.replace(".1.", ".2."): value for name, value in state.items()}
        elif change == "rows":
            state = {name: value[:-1] for name, value in state.items()}
        elif change == "bias":
            del state["context_hidden.1.bias"]
        elif change == "extra":
            state["lm_head.weight"] = torch.zeros(1)
        else:
            state["context_hidden.1.weight"] = torch.zeros(2 * ROWS, NZ)
        torch.save(state, saved / "decoder.pt")
        with pytest.raises(CheckpointError, match=r"decoder\.pt is not the decoder"):
            read_folder(saved)


class TestWriting:
    def test_refuses_to_overwrite(self, saved):
        with pytest.raises(OutputError, match="exists"):
            write_folder(contents(), saved)
        assert read_folder(saved).pooling == "last"

    def test_overwrite_replaces_the_whole_folder(self, saved):
        (saved / "stray").write_text("x")
        with pytest.raises(OutputError, match="would be replaced"):
            write_folder(contents(pooling="cls"), saved, overwrite=True)
        assert read_folder(saved).pooling == "last"
        (saved / "stray").unlink()
        write_folder(contents(pooling="cls"), saved, overwrite=True)
        assert read_folder(saved).pooling == "cls"
        assert sorted(os.listdir(saved)) == sorted([*FILES, MARK])
        assert os.listdir(saved.parent) == ["model"]

    def test_what_was_not_written_here_is_never_replaced(self, tmp_path):
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "decoder.pt").write_text("mine")
        with pytest.raises(OutputError, match="left alone"):
            write_folder(contents(), mine, overwrite=True)
        assert os.listdir(mine) == ["decoder.pt"]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_failure_leaves_what_was_there(self, saved, monkeypatch, overwrite):
        before = {name: (saved / name).read_bytes() for name in FILES}

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(langvae_files.torch, "save", full)
        target = saved if overwrite else saved.parent / "new"
        with pytest.raises(OutputError, match="No space left"):
            write_folder(contents(pooling="cls"), target, overwrite=overwrite)
        assert {name: (saved / name).read_bytes() for name in FILES} == before
        assert os.listdir(saved.parent) == ["model"]

    def test_failed_rename_puts_the_old_folder_back(self, saved, monkeypatch):
        rename = langvae_files.Path.rename

        def fails(path, target):
            if path.name.startswith(TEMPORARY):
                raise OSError(5, "Input/output error")
            return rename(path, target)

        monkeypatch.setattr(files, "exchange", lambda one, other: False)  # as on a system without renameat2
        monkeypatch.setattr(langvae_files.Path, "rename", fails)
        with pytest.raises(OutputError, match="Input/output"):
            write_folder(contents(pooling="cls"), saved, overwrite=True)
        monkeypatch.undo()
        assert read_folder(saved).pooling == "last"
        assert os.listdir(saved.parent) == ["model"]

    def test_parent_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(OutputError, match="cannot write checkpoint"):
            write_folder(contents(), tmp_path / "file" / "model")


@pytest.fixture
def parts(tmp_path):
    """A tiny BERT and a tiny Llama of two layers with a shared tokenizer, saved so that no copy is needed."""
    tokenizer = tiny_tokenizer()
    for name, model in (
        ("encoder", tiny_encoder("bert", vocab_size=len(tokenizer))),
        ("decoder", tiny_decoder("llama", layers=LAYERS, vocab_size=len(tokenizer))),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        write_legacy_copy(tmp_path / name, tmp_path / f"old_{name}")
    return {"encoder_path": str(tmp_path / "old_encoder"), "decoder_path": str(tmp_path / "old_decoder")}


def test_reference_from_a_written_folder(tmp_path, parts):
    folder = write_folder(contents(**parts), tmp_path / "model")
    model = load_reference(folder)
    assert not model.training
    assert len(model.decode(torch.randn(2, NZ))) == 2
    moved = tmp_path / "moved"
    shutil.move(parts["decoder_path"], moved)
    with pytest.raises(CheckpointError, match="pass decoder="):
        load_reference(folder)
    assert load_reference(folder, decoder=str(moved)).max_len == MAX_LEN


def test_reference_refuses_parts_that_do_not_fit(tmp_path, parts):
    narrow = contents(**parts, posterior_weight=torch.randn(2 * NZ, WIDTH - 1))
    with pytest.raises(CheckpointError, match="narrower encoder"):
        load_reference(write_folder(narrow, tmp_path / "a"))
    deep = contents(**parts, projector_weight=torch.zeros(3, ROWS, NZ), projector_bias=torch.zeros(3, ROWS))
    with pytest.raises(CheckpointError, match=r"3 layers of 192 rows.*2 layers of 192 rows"):
        load_reference(write_folder(deep, tmp_path / "b"))
    with pytest.raises(CheckpointError, match=r"decoder folder .* holds no config\.json"):
        load_reference(write_folder(contents(**parts), tmp_path / "c"), decoder=str(tmp_path))
