"""Files of latents that are not what they say: each a typed error, none of them a number."""

from __future__ import annotations

import gzip
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lmvae_fast.errors import DataError, LatentError, LMVAEError, MemoryLimitError
from lmvae_fast.generation.latent_files import check_latents, read_latents, width_of, write_latents
from lmvae_fast.generation.latent_sources import read_prompts

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def lines(*rows):
    return lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def big_endian(path):
    np.save(path, ROWS.astype(">f4"))


def truncated(path):
    np.save(path, ROWS)
    path.write_bytes(path.read_bytes()[:-7])


def zipped(path):
    with open(path, "wb") as file:
        np.savez(file, z=ROWS)


def header(text):
    def write(path):
        body = text.encode() + b"\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + ROWS.tobytes())

    return write


def torch_file(value):
    return lambda path: torch.save(value(), path)


FAULTS = {
    "strings.jsonl": (lines(["1", "2", "3", "4"]), "no row"),
    "booleans.jsonl": (lines([True, False, True, True]), "no row"),
    "keys.jsonl": (lines({"z": {"1": 0, "2": 0, "3": 0, "4": 0}}), "no row"),
    "text.jsonl": (lines({"z": "1234"}), "no row"),
    "nested.jsonl": (lines([[1, 2, 3, 4]]), "no row"),
    "null.jsonl": (lines(None), "no row"),
    "other.jsonl": (lines({"y": [1, 2, 3, 4]}), "no row"),
    "twice.jsonl": (lambda path: path.write_text('{"z": [1, 2, 3, 4], "z": [0, 0, 0, 0]}\n'), "key twice"),
    "long.jsonl": (lambda path: path.write_text("[" + "9" * 5000 + ", 1, 1, 1]\n"), "integer is too long"),
    "large.jsonl": (lines([10**200, 1, 1, 1]), "NaN or Inf"),
    "infinite.jsonl": (lines([float("inf"), 1, 1, 1]), "NaN or Inf"),
    "deep.jsonl": (lambda path: path.write_text("[" * 10**5 + "]" * 10**5 + "\n"), "levels"),
    "latin.jsonl": (lambda path: path.write_bytes(b'["\xe9"]\n'), "UTF-8"),
    "big_endian.npy": (big_endian, "byte order"),
    "truncated.npy": (truncated, "truncated"),
    "zip.npy": (zipped, r"no \.npy"),
    "objects.npy": (lambda path: np.save(path, np.array([[print] * 4])), r"no \.npy"),
    "complex.npy": (lambda path: np.save(path, ROWS + 1j), "real numbers"),
    "booleans.npy": (lambda path: np.save(path, ROWS > 1), "real numbers"),
    "texts.npy": (lambda path: np.save(path, np.array([["a"] * 4])), "real numbers"),
    "fields.npy": (lambda path: np.save(path, np.zeros((3, 4), [("a", "f4")])), "real numbers"),
    "wide.npy": (lambda path: np.save(path, ROWS.astype(np.longdouble)), "real numbers"),
    "larger.npy": (header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }"), "truncated"),
    "negative.npy": (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 4), }"), "truncated|width"),
    "code.npy": (header("__import__('os')"), "truncated"),
    "nan.npy": (lambda path: np.save(path, ROWS * np.nan), "NaN or Inf"),
    "complex.safetensors": (lambda path: save_file({"z": torch.zeros(3, 4, dtype=torch.complex64)}, path), "real"),
    "booleans.safetensors": (lambda path: save_file({"z": torch.zeros(3, 4, dtype=torch.bool)}, path), "real"),
    "npy.safetensors": (lambda path: write_as(path, ".npy"), "truncated or corrupt"),
    "sparse.pt": (torch_file(lambda: torch.eye(4).to_sparse()), "plain tensor"),
    "compressed.pt": (torch_file(lambda: torch.eye(4).to_sparse_csr()), "plain tensor|no file of tensors"),
    "quantised.pt": (torch_file(lambda: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8)), "plain|no file"),
    "complex.pt": (torch_file(lambda: torch.eye(4) + 1j), "plain tensor"),
    "booleans.pt": (torch_file(lambda: torch.eye(4) > 0), "plain tensor"),
    "expanded.pt": (torch_file(lambda: torch.zeros(1).expand(10**12, 4)), "plain tensor"),
    "code.pt": (torch_file(lambda: {"z": print}), "no file of tensors"),
    "list.pt": (torch_file(lambda: [torch.eye(4)]), "plain tensor"),
    "half.csv": (lambda path: path.write_text("1.0,x,3,4\n1,2,3,4\n"), "neither numbers nor a header"),
    "comment.csv": (lambda path: path.write_text("1,2,3,4#5\n"), "neither|truncated or corrupt"),
    "ragged.csv": (lambda path: path.write_text("1,2,3,4\n1,2,3\n"), "truncated or corrupt"),
    "pipe.npy": (os.mkfifo, "ordinary"),
    "pipe.jsonl": (os.mkfifo, "ordinary"),
    "pipe.safetensors": (os.mkfifo, "ordinary"),
}  # fmt: skip


def write_as(path, suffix):
    write_latents(path.with_suffix(suffix), torch.tensor(ROWS))
    path.with_suffix(suffix).rename(path)


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning", "ignore:.*:RuntimeWarning")
@pytest.mark.parametrize("name", FAULTS)
def test_what_is_refused(tmp_path, name):
    write, message = FAULTS[name]
    write(tmp_path / name)
    with pytest.raises((DataError, LatentError), match=message):
        check_latents(tmp_path / name, latent_dim=4)
    with pytest.raises(LMVAEError):
        assert check_latents(tmp_path / name, latent_dim=width_of(tmp_path / name))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_byte_order_mark_takes_no_row(tmp_path, name):
    rows = ROWS.tolist()
    form = json.dumps if name.endswith("jsonl") else lambda row: ",".join(map(str, row))
    (tmp_path / name).write_text("".join(form(row) + "\n" for row in rows), encoding="utf-8-sig")
    assert torch.cat(list(read_latents(tmp_path / name, latent_dim=4))).tolist() == rows
    (tmp_path / "prompts.txt").write_text("the sun\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "prompts.txt") == ["the sun"]


def test_columns_may_have_names(tmp_path):
    (tmp_path / "z.csv").write_text("a,b,c,d\n1,2,3,4\n")
    assert torch.cat(list(read_latents(tmp_path / "z.csv", latent_dim=4))).tolist() == [[1, 2, 3, 4]]


def test_what_inflates_is_refused_by_its_header(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**6)
    monkeypatch.setenv("LMVAE_LIMITS", "inflated=100000")
    with pytest.raises(DataError, match="inflates to too much"):
        check_latents(tmp_path / "bomb.pt", latent_dim=4)
    monkeypatch.undo()
    monkeypatch.setattr("lmvae_fast.memory._of_the_machine", lambda: 10**5)
    with pytest.raises(MemoryLimitError, match="not enough memory"):
        check_latents(tmp_path / "bomb.pt", latent_dim=4)


def test_lines_and_what_they_inflate_to_are_bounded(tmp_path, monkeypatch):
    from lmvae_fast.data import read

    (tmp_path / "one.txt.gz").write_bytes(gzip.compress(b"a" * (20 << 20)))
    with pytest.raises(DataError, match=r"line 1 is too long.*LMVAE_LIMITS=line="):
        read(tmp_path / "one.txt.gz")
    (tmp_path / "many.txt.gz").write_bytes(gzip.compress(b"a b c\n" * 10**5))
    monkeypatch.setenv("LMVAE_LIMITS", "inflated=1000")
    with pytest.raises(DataError, match="inflates to too much"):
        read(tmp_path / "many.txt.gz")
    monkeypatch.setenv("LMVAE_LIMITS", "records=1000")
    with pytest.raises(DataError, match="too many lines"):
        read(tmp_path / "many.txt.gz")
