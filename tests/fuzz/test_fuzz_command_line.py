"""The command line under wrong words: an exit code that is documented, no traceback, no hang, no memory.

2,000 command lines, drawn from a seed: valid ones of every command whose words are replaced, dropped, doubled and mixed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import signal
import sys

import pytest
import torch

from lmvae_fast.cli import main
from lmvae_fast.generation.latent_files import write_latents
from lmvae_fast.testing import make_model

LINES, SECONDS, MEMORY_KB = 2000, 20, 4 << 20
CODES = {0, 2, 3, 4, 130}
NUMBERS = [
    "0",
    "1",
    "2",
    "-1",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e309",
    "1000000000000",
    "9" * 30,
    "9" * 5000,
    "0x10",
    "",
    " ",
    "\N{ARABIC-INDIC DIGIT THREE}",
]
TEXTS = [
    "", " ", "a cat", "[/x]", "[red]b", ":smile:", "\udcff", "<|endoftext|>", "a" * 3000, "\N{SNOWMAN}", "a - b + c", "- -",
]  # fmt: skip
FILES = ["DATA", "LATENTS", "MODEL", "FOLDER", "PIPE", "EMPTY", "none.npy", "/dev/null", "/dev/full", "new.jsonl", "new.html",
         "new.png", "new", ".", "..", "corpus", "YAML", "new/deep/er.txt", "\udcff.jsonl", "a\nb.txt", "~"]  # fmt: skip
VALID = [
    ["generate", "MODEL", "--prior", "2"],
    ["generate", "MODEL", "--latents", "LATENTS", "--output", "new.jsonl", "--batch-size", "2"],
    ["generate", "MODEL", "--texts", "DATA", "--sample", "--top-k", "3", "--temperature", "0.5", "--seed", "1"],
    ["generate", "MODEL", "--prior", "2", "--prompt", "a cat", "--max-new-tokens", "3", "--logprobs"],
    ["interpolate", "MODEL", "a cat", "water", "--steps", "3"],
    ["traverse", "MODEL", "a cat", "--dims", "0-1", "--steps", "2", "--span", "2.0"],
    ["arithmetic", "MODEL", "a cat - water + a dog"],
    ["neighbourhood", "MODEL", "a cat", "--samples", "2", "--scale", "0.5"],
    ["average", "MODEL", "a cat", "water"],
    ["eval", "MODEL", "DATA", "--metrics", "elbo", "--limit", "3", "--batch-size", "2", "--samples", "2"],
    ["convert", "MODEL", "new", "--to", "langvae"],
    ["verify", "MODEL"],
    ["verify", "LATENTS", "--latent-dim", "4"],
    ["cache", "list"],
    ["cache", "prune", "--older-than", "3", "--dry-run"],
    ["env"],
    ["train", "--config", "YAML", "--output", "new", "--max-steps", "1", "--set", "train.beta=0.5"],
    ["train", "--data", "DATA", "--encoder", "ENCODER", "--decoder", "DECODER", "--output", "new", "--max-steps", "1"],
    ["probe", "--probes", "help"],
    ["define", "FOLDER", "planet", "--samples", "2"],
    ["fit-flow", "MODEL", "--data", "DATA", "--output", "new", "--max-steps", "1"],
    ["profile", "generate", "MODEL", "--batch-sizes", "1", "--seconds", "0"],
    ["nonsense"], [], ["--version"], ["--help"],
]  # fmt: skip
OPTIONS = [
    "--json", "--help", "--seed", "--steps", "--output", "--backend", "--batch-size", "--limit", "--column", "--set",
    "--config", "--dry-run", "--prior", "--latents", "--prompts", "--annotations", "--workers", "--overwrite", "--resume",
    "--num-samples", "--top-p", "--", "-x",
]  # fmt: skip


def changed(words: list[str], draw: random.Random) -> list[str]:
    """A valid command line with one to three faults."""
    words = list(words)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(words) + 1)
        kind = draw.randrange(6)
        word = draw.choice(draw.choice([NUMBERS, TEXTS, FILES]))
        if kind <= 2 and words and place < len(words):
            words[place] = word
        elif kind == 3 and words:
            words.pop(draw.randrange(len(words)))
        elif kind == 4:
            words[place:place] = [draw.choice(OPTIONS), word][: draw.randint(1, 2)]
        else:
            words.append(draw.choice(OPTIONS))
    return words


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Files of every kind by the names that command lines use."""
    place = tmp_path_factory.mktemp("lines")
    make_model("gpt2", latent_dim=4, max_len=8).save_pretrained(place / "model", include_frozen=True)
    write_latents(place / "z.npy", torch.randn(3, 4))
    (place / "data.txt").write_text(
        "".join(f"a {who} eats {what}\n" for who in ("cat", "dog", "bee") for what in ("meat", "corn", "figs"))
    )
    (place / "empty").write_text("")
    (place / "folder").mkdir()
    (place / "folder" / "mine.txt").write_text("mine")
    os.mkfifo(place / "pipe")
    names = {
        "MODEL": "model", "LATENTS": "z.npy", "DATA": "data.txt", "EMPTY": "empty", "FOLDER": "folder", "PIPE": "pipe",
        "YAML": "c.yaml", "ENCODER": "model/encoder", "DECODER": "model/decoder",
    }  # fmt: skip
    (place / "c.yaml").write_text(
        f"model: {{encoder: {place}/model/encoder, decoder: {place}/model/decoder, latent_dim: 2, max_len: 8}}\n"
        f"train: {{batch_size: 2, tensorboard: false}}\ndata: {{path: {place}/data.txt}}\n"
    )
    return place, {name: str(place / file) for name, file in names.items()}


def run(words: list[str]) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command line in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before, sys.argv = sys.argv, ["lmvae-fast", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.argv = before
    read = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err)]
    return code, read[0], read[1]


def check(words: list[str]) -> None:
    def late(number, frame):
        raise TimeoutError(f"over {SECONDS} s of computing")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        code, out, err = run(words)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert code in CODES, (words, code, err[-3000:])
    assert "Traceback" not in out + err and "of computing" not in err, (words, err[-3000:])
    if "--json" in words and "--help" not in words and "--version" not in words and "--" not in words and out:
        json.loads(out)


def corpus() -> list[list[str]]:
    """Every fault that was found once, and kept."""
    return [
        ["traverse", "MODEL", "a cat", "--dims", "0-99999999999"],
        ["traverse", "MODEL", "a cat", "--dims", "\N{SUPERSCRIPT TWO}"],
        ["interpolate", "MODEL", "a cat", "water", "--steps", "1000000000000"],
        ["neighbourhood", "MODEL", "a cat", "--samples", "1000000000000"],
        ["arithmetic", "MODEL", " " * 20000],
        ["arithmetic", "MODEL", "a" + " " * 20000 + "b"],
        ["average", "MODEL", "a \udcff b"],
        ["average", "MODEL", "<|endoftext|>"],
        ["generate", "MODEL", "--latents", "PIPE"],
        ["generate", "MODEL", "--prior", "9" * 30],
        ["generate", "MODEL", "--prior", "2", "--seed", "9" * 30, "--sample"],
        ["generate", "MODEL", "--prior", "2", "--output", "/dev/full"],
        ["interpolate", "MODEL", "a cat", "water", "--output", "/dev/full.html"],
        ["train", "--data", "PIPE", "--encoder", "ENCODER", "--decoder", "DECODER"],
        ["train", "--config", "YAML", "--set", "model.latent_dim=1000000000", "--output", "new"],
        ["train", "--config", "PIPE"],
        ["convert", "FOLDER", "new"],
        ["verify", "PIPE", "--json"],
    ]


@pytest.mark.parametrize("words", corpus(), ids=lambda words: " ".join(words)[:60].encode("ascii", "replace").decode())
def test_faults_that_were_found(world, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMVAE_CACHE", str(tmp_path / "cache"))
    check([world[1].get(word, word) for word in words])


@pytest.mark.fuzz
def test_command_lines(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    draw = random.Random(int(os.environ.get("LMVAE_FUZZ_SEED") or 0))
    before = (world[0] / "folder" / "mine.txt").read_text()
    for _ in range(int(os.environ.get("LMVAE_FUZZ_LINES") or LINES)):
        words = [world[1].get(word, word) for word in changed(draw.choice(VALID), draw)]
        if "demo" not in words:
            check(words)
        assert (world[0] / "folder" / "mine.txt").read_text() == before, words
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < MEMORY_KB
