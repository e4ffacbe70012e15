"""Model folders that lie: no code of theirs runs, nothing outside the output folder changes, nothing is taken for weights
that is none, and nothing is allocated that they do not hold."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

import lmvae_fast as lf
from lmvae_fast.errors import CheckpointError, LMVAEError, MemoryLimitError
from lmvae_fast.files import sha256_file
from lmvae_fast.testing import make_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "model"
    make_model("gpt2", latent_dim=4, max_len=8).save_pretrained(path, include_frozen=True)
    return path


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, part, change):
    """Change a part's tensors; the configuration then records their hash, so that they fit together."""
    path = folder / part / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    if not part:
        configure(folder, "", weights_sha256=sha256_file(path))


def configure(folder, part, **fields):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def largest(tensors):
    return max(tensors, key=lambda name: tensors[name].numel() * tensors[name].is_floating_point())


def with_value(value):
    def change(tensors):
        tensors[largest(tensors)].view(-1)[3] = value

    return change


def with_dtype(dtype):
    def change(tensors):
        name = largest(tensors)
        tensors[name] = tensors[name].to(dtype)

    return change


FAULTS = {
    "NaN": (with_value(float("nan")), "NaN or Inf"),
    "Inf": (with_value(float("inf")), "NaN or Inf"),
    "-Inf": (with_value(float("-inf")), "NaN or Inf"),
    "int8": (with_dtype(torch.int8), "floating dtype"),
    "int64": (with_dtype(torch.int64), "floating dtype"),
    "bool": (with_dtype(torch.bool), "floating dtype"),
    "complex64": (with_dtype(torch.complex64), "floating dtype"),
}


@pytest.mark.parametrize(
    ("part", "name"),
    [*(("", name) for name in FAULTS), ("encoder", "NaN"), ("encoder", "int8"), ("decoder", "Inf"), ("decoder", "bool"),
     ("decoder", "complex64")],
)  # fmt: skip
def test_weights_that_are_none(folder, part, name):
    change, message = FAULTS[name]
    rewrite(folder, part, change)
    with pytest.raises(CheckpointError, match=message):
        lf.LMVAE.from_pretrained(folder)


SIZES = [
    ("", {"latent_dim": 10**9}),
    ("", {"slots": 10**9, "visibility": "prefix"}),
    ("", {"slots": 10**9, "max_len": 10**8}),
    ("encoder", {"vocab_size": 10**9}),
    ("encoder", {"num_hidden_layers": 10**8}),
    ("encoder", {"intermediate_size": 10**9}),
    ("decoder", {"vocab_size": 10**9}),
    ("decoder", {"n_layer": 10**8}),
    ("decoder", {"n_positions": 10**9}),
    ("decoder", {"n_embd": 10**9}),
]


@pytest.mark.parametrize(("part", "fields"), SIZES)
def test_sizes_that_the_folder_does_not_hold_are_refused_before_they_are_made(folder, part, fields):
    configure(folder, part, **fields)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((CheckpointError, MemoryLimitError)):
        lf.LMVAE.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(whole, monkeypatch):
    monkeypatch.setattr("lmvae_fast.memory._of_the_machine", lambda: 1000)
    with pytest.raises(MemoryLimitError, match="not enough memory"):
        lf.LMVAE.from_pretrained(whole)


TEXTS = [
    "", "{", "[]", "null", '{"format": "lmvae_fast-1", "format": "lmvae_fast-1"}', "[" * 10**5,
    '{"latent_dim": ' + "9" * 5000 + "}", '\ufeff{"format": "other"}', "\0",
]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "text"), [*(("", text) for text in TEXTS), ("encoder", ""), ("encoder", "[]"), ("decoder", "[" * 10**5)]
)
def test_configurations_that_are_none(folder, part, text):
    (folder / part / "config.json").write_text(text)
    with pytest.raises(LMVAEError) as caught:
        lf.LMVAE.from_pretrained(folder)
    assert len(str(caught.value)) < 8000


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "decoder/config.json", "decoder/model.safetensors"]
)
def test_pipes_are_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError):
        lf.LMVAE.from_pretrained(folder)


def test_loading_changes_nothing_and_runs_nothing(folder, tmp_path):
    """Code beside every part, pickles under the names of weights, links out of the folder."""
    mark = tmp_path / "it-ran"
    code = f"open({str(mark)!r}, 'w').write('x')\n"
    for part in ("", "encoder", "decoder"):
        for name in ("modeling.py", "__init__.py", "setup.py", "conftest.py", "sitecustomize.py", "tokenizer.py"):
            (folder / part / name).write_text(code)
        if part:
            configure(folder, part, extra=None)
    (tmp_path / "outside.txt").write_text("mine")
    os.symlink(tmp_path / "outside.txt", folder / "decoder" / "notes.txt")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    model = lf.LMVAE.from_pretrained(folder)
    model.save_pretrained(tmp_path / "out")
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before}
    assert before == after and not mark.exists()
    new = {p for p in tmp_path.rglob("*") if p.is_file()} - before.keys()
    assert all(tmp_path / "out" in p.parents for p in new)


class Pickled:
    def __reduce__(self):
        return (os.system, ("touch it-ran",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_pickles_are_not_run(folder, part, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / part / "model.safetensors").unlink()
    torch.save({"weight": Pickled()}, folder / part / name)
    with pytest.raises(CheckpointError):
        lf.LMVAE.from_pretrained(folder)
    assert not (tmp_path / "it-ran").exists()


def test_two_saves_of_a_model_are_equal_to_the_byte(tmp_path):
    model = make_model("gpt2", latent_dim=4, max_len=8)
    model.save_pretrained(tmp_path / "one", include_frozen=True)
    model.encode(["a cat", "a cat is a kind of animal"])  # pads, and truncates
    model.decode(torch.zeros(2, 4))
    model.save_pretrained(tmp_path / "two", include_frozen=True)
    lf.LMVAE.from_pretrained(tmp_path / "two").save_pretrained(tmp_path / "three", include_frozen=True)
    one = {p.relative_to(tmp_path / "one"): p for p in sorted((tmp_path / "one").rglob("*")) if p.is_file()}
    for name, path in one.items():
        assert path.read_bytes() == (tmp_path / "two" / name).read_bytes(), name
        if name.suffix == ".safetensors" or name.name == "tokenizer.json":
            assert path.read_bytes() == (tmp_path / "three" / name).read_bytes(), name


@pytest.mark.parametrize("mode", [0o755, 0o700, 0o775])
def test_files_are_shared_as_their_folder_is(tmp_path, mode):
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(mode)
    before = os.umask(0o777 & ~mode)
    try:
        make_model("gpt2", latent_dim=4, max_len=8).save_pretrained(place / "model", include_frozen=True)
    finally:
        os.umask(before)
    for path in (place / "model").rglob("*"):
        wanted = mode if path.is_dir() else mode & 0o666
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
