"""Every reader under damaged files: what is read, or an error of ours that names it; nothing else, and soon.

1,000 files, drawn from a seed: whole ones of every kind with bits flipped, bytes cut, doubled, put in and mixed up.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import lmvae_fast as lf
from lmvae_fast.config.base import read_mapping
from lmvae_fast.data import read, read_word_vectors
from lmvae_fast.errors import LMVAEError
from lmvae_fast.generation.latent_files import check_latents, width_of
from lmvae_fast.generation.latent_sources import read_prompts
from lmvae_fast.generation.text_files import check_text_file
from lmvae_fast.testing import make_model
from lmvae_fast.training.callbacks import read_records
from lmvae_fast.training.checkpoints import folder as checkpoint
from lmvae_fast.verification import verify
from tests.training.helpers import StopAt, run

FILES, SECONDS, MEMORY_KB = 1000, 20, 4 << 20
ROWS = np.arange(20, dtype=np.float32).reshape(5, 4)
TEXT = "a cat eats meat\nwater boils\na dog barks & ARG0 V\nna\u00efve caf\u00e9\n"


def latents(path: Path) -> None:
    check_latents(path, latent_dim=width_of(path))


def samples(place: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """Whole files of every kind: name -> (file, what reads a file or a folder with it inside)."""
    np.save(place / "z.npy", ROWS)
    np.savez(place / "v.npz", vectors=ROWS, words=np.array(list("abcde")))
    np.save(place / "w.npy", ROWS)
    (place / "w.vocab").write_text("a\nb\nc\nd\ne\n")
    save_file({"z": torch.tensor(ROWS)}, place / "z.safetensors")
    torch.save({"z": torch.tensor(ROWS)}, place / "z.pt")
    (place / "z.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in ROWS.tolist()))
    (place / "z.jsonl").write_text("".join(json.dumps({"z": row}) + "\n" for row in ROWS.tolist()))
    (place / "t.txt").write_text(TEXT)
    (place / "t.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (place / "t.jsonl").write_text("".join(json.dumps({"text": line, "n": 1}) + "\n" for line in TEXT.splitlines()))
    (place / "t.json").write_text(json.dumps([{"text": line} for line in TEXT.splitlines()]))
    (place / "t.csv").write_text(
        "text,label\n" + "".join(f'"{line}",{i}\n' for i, line in enumerate(TEXT.splitlines()))
    )
    (place / "t.tsv").write_text(
        "text\tlabel\n" + "".join(f"{line}\t{i}\n" for i, line in enumerate(TEXT.splitlines()))
    )
    (place / "v.txt").write_text("5 4\n" + "".join(f"w{i} 1.0 2.0 -3e-2 4\n" for i in range(5)))
    (place / "c.yaml").write_text(yaml.safe_dump({"model": {"latent_dim": 4, "encoder": "x"}, "train": {"beta": 0.5}}))
    (place / "c.json").write_text(json.dumps({"model": {"latent_dim": 4, "encoder": "x"}, "train": {"beta": 0.5}}))
    (place / "p.jsonl").write_text('{"prompt": "a cat"}\n"water"\n')
    (place / "o.jsonl").write_text('{"index": 0}\n')
    (place / "o.jsonl.meta.json").write_text(json.dumps({"model": "x", "latents": "y", "block_size": 3}))
    (place / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "elbo": -3.5}\n{"kind": "eval", "step": 2}\n')
    found: dict[str, tuple[Path, Callable[[Path], object]]] = {
        name: (place / name, latents) for name in ("z.npy", "z.safetensors", "z.pt", "z.csv", "z.jsonl")
    }
    found |= {name: (place / name, read) for name in ("t.txt", "t.txt.gz", "t.jsonl", "t.json")}
    found |= {name: (place / name, lambda path: read(path, column="text")) for name in ("t.csv", "t.tsv")}
    found |= {name: (place / name, read_word_vectors) for name in ("v.txt", "v.npz")}
    found["w.npy"] = place / "w.npy", lambda path: read_word_vectors(path, vocabulary=list("abcde"))
    found |= {name: (place / name, read_mapping) for name in ("c.yaml", "c.json")}
    found["p.jsonl"] = place / "p.jsonl", read_prompts
    found["metrics.jsonl"] = place / "metrics.jsonl", read_records
    found["o.jsonl.meta.json"] = place / "o.jsonl.meta.json", lambda path: check_text_file(path.with_name("o.jsonl"))
    return found


def damaged(content: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """A file's bytes with one to four faults."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data) + 1)
        kind = draw.randrange(8)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = draw.randbytes(draw.randint(1, 16))
        elif kind == 3:
            data[place:place] = data[max(0, place - 20) : place]
        elif kind == 4:
            del data[place : place + draw.randint(1, 16)]
        elif kind == 5:
            other = draw.choice(others)
            data[place:place] = other[: draw.randint(1, 64)]
        elif kind == 6:
            data[place:place] = draw.choice(
                [
                    b"\0",
                    b"\xff",
                    b"\xef\xbb\xbf",
                    b"[" * 500,
                    b"9" * 400,
                    b"nan",
                    b"1e999",
                    b'"',
                    b"{",
                    b"\n",
                    b"\r",
                    b"&a *a",
                    b"null",
                ]
            )
        else:
            data = bytearray(draw.choice(others))
    return bytes(data)


def attempt(reader: Callable[[Path], object], path: Path) -> bool:
    """Whether a file was read; False for an error of ours. Anything else ends the test."""
    started = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader(path)
        return True
    except LMVAEError as error:
        if len(str(error)) > 10_000:
            raise
        return False
    finally:
        assert time.process_time() - started < SECONDS, path


def test_whole_files_are_read(tmp_path):
    for name, (path, reader) in samples(tmp_path).items():
        assert attempt(reader, path), name


@pytest.mark.parametrize(
    ("content", "name"), [("w.npy", "x.npz"), ("v.npz", "x.npy"), ("z.pt", "x.npz"), ("t.txt", "x.npz")]
)
def test_one_kind_under_the_name_of_another(tmp_path, content, name):
    samples(tmp_path)
    shutil.copy(tmp_path / content, tmp_path / name)
    assert not attempt(
        lambda path: read_word_vectors(path, field="vectors" if name == "x.npz" else None), tmp_path / name
    )


def test_a_few_damaged_files(tmp_path):
    fuzz(tmp_path, 60, 1)


def fuzz(place: Path, count: int, seed: int) -> None:
    draw = random.Random(seed)
    whole = samples(place)
    contents = {name: path.read_bytes() for name, (path, _) in whole.items()}
    others = list(contents.values())
    for number in range(count):
        name = draw.choice(list(whole))
        path, reader = whole[name]
        path.write_bytes(damaged(contents[name], draw, others))
        try:
            attempt(reader, path)
        except BaseException as error:
            raise AssertionError(f"{name}, file {number} of seed {seed}: {path.read_bytes()[:300]!r}") from error
        path.write_bytes(contents[name])


@pytest.mark.fuzz
def test_damaged_files(tmp_path):
    fuzz(tmp_path, int(os.environ.get("LMVAE_FUZZ_FILES") or FILES), int(os.environ.get("LMVAE_FUZZ_SEED") or 0))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < MEMORY_KB


@pytest.mark.fuzz
def test_damaged_folders(tmp_path):
    """Models, runs and checkpoints with one damaged file; those that load have not changed what they compute unseen."""
    make_model("gpt2", latent_dim=4, max_len=8).save_pretrained(tmp_path / "model", include_frozen=True)
    run(tmp_path / "run", StopAt(3), save_every=3)
    newest = checkpoint.complete(tmp_path / "run" / "checkpoints")[0]
    draw = random.Random(int(os.environ.get("LMVAE_FUZZ_SEED") or 0))
    for _ in range(200):
        source, reader = draw.choice([(tmp_path / "model", lf.LMVAE.from_pretrained), (newest, checkpoint.load)])
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        place = tmp_path / "copy" / source.name
        shutil.copytree(source, place)
        file = draw.choice([path for path in sorted(place.rglob("*")) if path.is_file()])
        file.write_bytes(damaged(file.read_bytes(), draw, [b"{}", b"[]", b"\0" * 64]))
        attempt(reader, place)
        attempt(verify, place)
