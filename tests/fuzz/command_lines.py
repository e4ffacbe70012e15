"""Command lines with faults, each in a process of its own: what they end with, how long they take, what they leave behind.

    python -m tests.fuzz.command_lines FOLDER LINES SEED     drawn
    python -m tests.fuzz.command_lines FOLDER FILE           a JSON file of lists of words

This process imports everything once and forks a child per command line, so that 2,000 of them cost 2,000 forks and not 2,000
imports of torch. Prints one line of JSON: lines by command and by exit code, the slowest and the largest, the faults, and, of
lines in a file, how each ended.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

import lmvae_fast as lf
from lmvae_fast.cli import main as command_line
from lmvae_fast.cli.ending import FAULT, NOT_FINITE
from lmvae_fast.data import WordVectors
from lmvae_fast.generation.latent_files import write_latents
from lmvae_fast.testing import SENTENCES, make_model, tiny_decoder, tiny_tokenizer
from tests.training.helpers import prompt_pairs

#: Seconds of computing, and resident memory, that no command line may take; of the clock, as much as a busy machine needs.
SECONDS, MEMORY = 20, 4 << 30
CODES = {0, 2, 3, NOT_FINITE, 130}
HUGE = 10**4  #: a number from which on long work is what was asked for: it must end when it is interrupted

NUMBERS = [
    "0", "1", "2", "-1", "1.5", "nan", "inf", "-inf", "1e309", "1000000000000", "9" * 30, "9" * 5000, "0x10", "", " ",
    "\N{ARABIC-INDIC DIGIT THREE}", "65536", "100000", "1e-320",
]  # fmt: skip
TEXTS = [
    "", " ", "a cat", "[/x]", "[red]b", ":smile:", "\udcff", "<|endoftext|>", "a" * 3000, "\N{SNOWMAN}", "a - b + c", "- -",
    "{}", "[]", "null", "a, b", "0-9", "train.beta=1e999", "model.latent_dim=1e3", "x=y", "train.=1", "data.path=[1]",
]  # fmt: skip
FILES = ["DATA", "LATENTS", "MODEL", "FOLDER", "PIPE", "EMPTY", "PAIRS", "FLOW", "RUN", "CVAE", "none.npy", "/dev/null",
         "/dev/full", "/dev/zero", "new.jsonl", "new.html", "new.png", "new", ".", "..", "corpus", "YAML",
         "new/deep/er.txt", "\udcff.jsonl", "a\nb.txt", "~", "/proc/self/mem", "n" * 300]  # fmt: skip
NEW = ["--encoder", "ENCODER", "--decoder", "DECODER", "--output", "new", "--max-steps", "1"]
FIT = ["--vectors", "VECTORS", "--output", "new", "--max-steps", "1", "--blocks", "2", "--hidden", "8"]
VALID = [
    ["generate", "MODEL", "--prior", "2"],
    ["generate", "MODEL", "--latents", "LATENTS", "--output", "new.jsonl", "--batch-size", "2"],
    ["generate", "MODEL", "--texts", "DATA", "--sample", "--top-k", "3", "--temperature", "0.5", "--seed", "1"],
    ["generate", "MODEL", "--prior", "2", "--prompt", "a cat", "--max-new-tokens", "3", "--logprobs"],
    ["generate", "MODEL", "--prior", "3", "--num-samples", "2", "--sample", "--output", "new.txt", "--dry-run"],
    ["generate", "CVAE", "--prompts", "PAIRS", "--z", "prior", "--num-samples", "2", "--max-prompt-len", "9"],
    ["generate", "DECODER", "--prompts", "PAIRS", "--max-new-tokens", "2", "--output", "new.jsonl"],
    ["interpolate", "MODEL", "a cat", "water", "--steps", "3"],
    ["traverse", "MODEL", "a cat", "--dims", "0-1", "--steps", "2", "--span", "2.0"],
    ["traverse", "MODEL", "a cat", "--dims", "0", "--steps", "2", "--quantiles-of", "DATA", "--tail", "0.1"],
    ["arithmetic", "MODEL", "a cat - water + a dog"],
    ["neighbourhood", "MODEL", "a cat", "--samples", "2", "--scale", "0.5", "--output", "new.html"],
    ["average", "MODEL", "a cat", "water"],
    ["eval", "MODEL", "DATA", "--metrics", "elbo", "--limit", "3", "--batch-size", "2", "--samples", "2"],
    ["eval", "CVAE", "PAIRS", "--metrics", "elbo", "--limit", "4"],
    ["eval", "FLOW", "--definitions", "--limit", "2", "--batch-size", "2"],
    ["convert", "MODEL", "new", "--to", "langvae"],
    ["convert", "MODEL", "new", "--dry-run"],
    ["verify", "MODEL"],
    ["verify", "RUN"],
    ["verify", "LATENTS", "--latent-dim", "4"],
    ["cache", "list"],
    ["cache", "prune", "--older-than", "3", "--dry-run"],
    ["env"],
    ["train", "--config", "YAML", "--output", "new", "--max-steps", "1", "--set", "train.beta=0.5"],
    ["train", "--data", "DATA", *NEW, "--latent-dim", "2", "--max-len", "8", "--batch-size", "2"],
    ["train", "--data", "DATA", *NEW, "--system", "optimus", "--dry-run"],
    ["train", "--system", "cvae", "--data", "PAIRS", "--decoder", "DECODER", "--output", "new", "--max-steps", "1",
     "--latent-dim", "4", "--max-len", "8", "--max-prompt-len", "8", "--penalty", "DG-VAE"],
    ["finetune", "--data", "PAIRS", "--decoder", "DECODER", "--output", "new", "--max-steps", "1", "--batch-size", "2",
     "--max-len", "9", "--max-prompt-len", "9", "--lr", "0.01"],
    ["finetune", "--data", "PAIRS", "--decoder", "DECODER", "--output", "new", "--lora", "--dry-run"],
    ["probe", "--probes", "help"],
    ["probe", "MODEL", "--data", "DATA", "--probes", "overview,neighbourhoods", "--limit", "4", "--decoded", "2",
     "--resamples", "2"],
    ["define", "FLOW", "word1", "--samples", "2", "--max-new-tokens", "2"],
    ["fit-flow", "MODEL", "--data", "DEFINITIONS", *FIT, "--batch-size", "4", "--shares", "0.6,0.2,0.2"],
    ["fit-flow", "MODEL", "--data", "DEFINITIONS", *FIT, "--dry-run"],
    ["profile", "generate", "MODEL", "--batch-sizes", "1", "--seconds", "0"],
    ["nonsense"], [], ["--version"], ["--help"],
]  # fmt: skip
WRONG = (["nonsense"], [])  # the others end with 0
OPTIONS = [
    "--json", "--help", "--seed", "--steps", "--output", "--backend", "--batch-size", "--limit", "--column", "--set",
    "--config", "--dry-run", "--prior", "--latents", "--prompts", "--annotations", "--workers", "--overwrite", "--resume",
    "--num-samples", "--top-p", "--", "-x", "--max-len", "--latent-dim", "--data", "--layout", "--max-prompt-len",
    "--blocks", "--hidden", "--samples", "--decoded", "--resamples", "--max-new-tokens", "--vectors", "--from",
]  # fmt: skip


def changed(words: list[str], draw: random.Random) -> list[str]:
    """A valid command line with one to three faults, most of them in values: a wrong option ends before any work."""
    words = list(words)
    for _ in range(draw.choice((1, 1, 2, 3))):
        place = draw.randrange(len(words) + 1)
        values = [i for i, word in enumerate(words) if i and not word.startswith("--")]
        kind = draw.randrange(10)
        word = draw.choice(draw.choice([NUMBERS, TEXTS, FILES]))
        if kind <= 4 and values:
            words[draw.choice(values)] = word
        elif kind == 5 and words:
            words[place % len(words)] = word
        elif kind == 6 and words:
            words.pop(draw.randrange(len(words)))
        elif kind == 7:
            words[place:place] = [draw.choice(OPTIONS), word][: draw.randint(1, 2)]
        else:
            words += [draw.choice(OPTIONS), word][: draw.choice((1, 2, 2))]
    return words


def make_world(place: Path) -> dict[str, str]:
    """Files of every kind below a folder; their paths by the names that command lines use."""
    place.mkdir(parents=True, exist_ok=True)
    model = make_model("gpt2", latent_dim=4, max_len=8)
    model.save_pretrained(place / "model", include_frozen=True)
    make_model("llama", system="cvae", latent_dim=6, queries=2).save_pretrained(place / "cvae", include_frozen=True)
    tokenizer = tiny_tokenizer()
    tiny_decoder("llama", vocab_size=len(tokenizer)).save_pretrained(place / "decoder")
    tokenizer.save_pretrained(place / "decoder")
    write_latents(place / "z.npy", torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    (place / "data.txt").write_text(
        "".join(f"a {who} eats {what}\n" for who in ("cat", "dog", "bee") for what in ("meat", "corn", "figs"))
    )
    lf.PromptDataset(prompt_pairs(6)).write_jsonl(place / "pairs.jsonl")
    words = [f"word{i}" for i in range(12)]
    rows = [f"{word}\t{SENTENCES[i % 8]}" for i, word in enumerate(words)]
    (place / "definitions.tsv").write_text("\n".join(["lemma\tdefinition", *rows]) + "\n")
    WordVectors(words, np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)).save(
        place / "vectors.safetensors"
    )
    (place / "empty").write_text("")
    (place / "folder").mkdir()
    (place / "folder" / "mine.txt").write_text("mine")
    os.mkfifo(place / "pipe")
    (place / "c.yaml").write_text(
        f"model: {{encoder: {place}/model/encoder, decoder: {place}/model/decoder, latent_dim: 2, max_len: 8}}\n"
        f"train: {{batch_size: 2, tensorboard: false}}\ndata: {{path: {place}/data.txt}}\n"
    )
    names = {
        "MODEL": "model", "LATENTS": "z.npy", "DATA": "data.txt", "EMPTY": "empty", "FOLDER": "folder", "PIPE": "pipe",
        "YAML": "c.yaml", "ENCODER": "model/encoder", "DECODER": "decoder", "PAIRS": "pairs.jsonl", "CVAE": "cvae",
        "DEFINITIONS": "definitions.tsv", "VECTORS": "vectors.safetensors", "FLOW": "flow", "RUN": "run",
    }  # fmt: skip
    return {name: str(place / file) for name, file in names.items()}


def attempt(words: list[str], place: Path, environment: dict[str, str]) -> dict:
    """What a command line does in a child, in an empty working folder ``place/here``: code, output, seconds, memory."""
    shutil.rmtree(place, ignore_errors=True)
    (place / "here").mkdir(parents=True)
    names = [place / "out", place / "err"]
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            for name, number in zip(names, (1, 2), strict=True):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ.update(environment)
            os.chdir(place / "here")
            resource.setrlimit(resource.RLIMIT_CPU, (3 * SECONDS, 3 * SECONDS))
            sys.argv = ["lmvae-fast", *words]
            command_line()
            os._exit(0)
        except SystemExit as end:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    found = _wait(child, started, any(_huge(word) for word in words))
    with contextlib.suppress(ProcessLookupError):  # those that it started
        os.killpg(child, signal.SIGKILL)
    return found | dict(
        zip(("out", "err"), (name.read_bytes().decode("utf-8", "replace") for name in names), strict=True)
    )


def _wait(child: int, started: float, asked_for: bool) -> dict:
    """Until a child ends, or is over a limit; one that was asked for endless work is interrupted, and must end with 130."""
    most, interrupted, over = 0, None, None
    ticks = os.sysconf("SC_CLK_TCK")
    pause = 0.002
    while True:
        process, status, used = os.wait4(child, os.WNOHANG)
        if process:
            break
        time.sleep(pause)
        pause = min(1.5 * pause, 0.05)
        with contextlib.suppress(OSError, ValueError, IndexError):
            most = max(most, int(Path(f"/proc/{child}/statm").read_text().split()[1]) * resource.getpagesize())
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            busy, waited = (int(fields[11]) + int(fields[12])) / ticks, time.monotonic() - started
            if most > MEMORY:
                over = "memory"
            elif interrupted is not None and waited - interrupted > SECONDS:
                over = "does not end when it is interrupted"
            elif interrupted is None and asked_for and busy > 5:
                interrupted = waited
                os.kill(child, signal.SIGINT)
            elif not asked_for and (busy > SECONDS or waited > 15 * SECONDS):
                over = "time"
            if over:
                os.kill(child, signal.SIGKILL)
    most = max(most, used.ru_maxrss * 1024)
    return {
        "code": os.waitstatus_to_exitcode(status), "over": over, "interrupted": interrupted is not None,
        "seconds": round(used.ru_utime + used.ru_stime, 2), "memory": most,
    }  # fmt: skip


def _huge(word: str) -> bool:
    with contextlib.suppress(ValueError, OverflowError):
        return abs(float(word.rpartition("=")[2])) >= HUGE
    return False


def fault(words: list[str], found: dict) -> str | None:
    """What is wrong with how a command line ended; None for nothing."""
    if found["over"]:
        return f"over a limit: {found['over']}"
    if found["interrupted"] and found["code"] not in (130, 0, 3):
        return "interrupted, and another code than 130"
    if found["code"] not in CODES:
        return "a fault of ours" if found["code"] == FAULT else "an exit code that is not documented"
    if "Traceback" in found["out"] + found["err"]:
        return "a traceback"
    if found["code"] in (2, 3) and not (found["out"] + found["err"]).strip():
        return "an error without a word"
    asked = words[: words.index("--")] if "--" in words else words
    if "--json" in asked and "--help" not in asked and "--version" not in asked and found["out"]:
        try:
            json.loads(found["out"])
        except ValueError:
            return "--json printed something else"
    return None


def snapshot(place: Path) -> list[tuple]:
    """What tells whether a file of a tree was touched."""
    rows = []
    for path in sorted(place.rglob("*")):
        status = path.lstat()
        rows.append((str(path), status.st_size, 0 if path.is_dir() else status.st_mtime_ns))
    return rows


def _outside(folders: list[str], rows: list[tuple]) -> list[tuple]:
    return [
        row
        for row in rows
        if not any(row[0] == each or row[0].startswith((each + os.sep, each + ".")) for each in folders)
    ]


def server(folder: Path) -> Callable[[list[str]], dict]:
    """A world below a folder. What is returned runs a line in it, and says how it ended, and ``why`` it is a fault."""
    world = make_world(folder / "world")
    environment = {
        "LMVAE_CACHE": str(folder / "scratch" / "cache"), "HOME": str(folder / "scratch" / "home"), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "120", "NO_COLOR": "1",
    }  # fmt: skip
    (folder / "scratch" / "home").mkdir(parents=True)
    os.environ.update(environment)
    place = folder / "lines" / "one"

    def run(drawn: list[str]) -> dict:
        nonlocal before
        words = [world.get(word, word) for word in drawn]
        found = attempt(words, place, environment)
        found["why"] = fault(words, found)
        after = snapshot(folder / "world")
        # Where a line names it as output, an empty file may be replaced, with files of generation beside it, and what was
        # made as a run is locked and marked.
        own = [word for flag, word in itertools.pairwise(words) if flag == "--output" and word in ours]
        if _outside(own, after) != _outside(own, before):
            found["why"] = found["why"] or "files that are not its own were changed"
        before = after
        return found

    ours = {world[name] for name in ("EMPTY", "RUN", "FLOW")}
    before = snapshot(folder / "world")
    for made in (
        ["fit-flow", "MODEL", "--data", "DEFINITIONS", *FIT, "--output", "FLOW"],
        ["train", "--config", "YAML", "--max-steps", "2", "--output", "RUN"],
    ):
        found = run(made)
        assert found["code"] == 0, found["err"]
    warm_up(world, folder / "warm")
    return run


def warm_up(world: dict[str, str], place: Path) -> None:
    """Run valid lines in this process: children inherit what commands and libraries import on first use."""
    before, argv = os.getcwd(), sys.argv
    for number, words in enumerate(VALID):
        here = place / str(number)
        here.mkdir(parents=True)
        os.chdir(here)
        sys.argv = ["lmvae-fast", *(world.get(word, word) for word in words)]
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):  # fmt: skip
            try:
                command_line()
            except SystemExit as end:
                if end.code and words not in WRONG:
                    raise RuntimeError(f"{words} was meant to be valid, and ended with {end.code}") from end
    os.chdir(before)
    sys.argv = argv
    gc.freeze()  # and their pages stay shared


def drawn_lines(lines: int, seed: int) -> Iterator[list[str]]:
    draw = random.Random(seed)
    for _ in range(lines):
        yield changed(draw.choice(VALID), draw)


def main(folder: Path, lines: Iterable[list[str]], *, keep: bool = False) -> dict:
    run = server(folder)
    commands, codes, faults, ended, slowest, largest = Counter(), Counter(), [], [], 0.0, 0
    started = time.monotonic()
    for number, words in enumerate(lines):
        found = run(words)
        commands[words[0][:20] if words else ""] += 1
        codes[found["code"]] += 1
        slowest, largest = max(slowest, found["seconds"]), max(largest, found["memory"])
        told = {"line": number, "words": words, **found, "out": found["out"][-2000:], "err": found["err"][-3000:]}
        if keep:
            ended.append(told)
        if number % 100 == 99:
            print(f"{number + 1} lines in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        if found["why"]:
            faults.append(told)
            print(json.dumps(told), file=sys.stderr, flush=True)
    return {
        "lines": sum(codes.values()), "codes": dict(codes), "commands": dict(commands.most_common(20)),
        "slowest_seconds": slowest, "largest_bytes": largest, "seconds": round(time.monotonic() - started, 1),
        "faults": faults, **({"ended": ended} if keep else {}),
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1]).resolve()
    if len(sys.argv) == 3:
        print(json.dumps(main(place, json.loads(Path(sys.argv[2]).read_text()), keep=True)))
    else:
        print(json.dumps(main(place, drawn_lines(int(sys.argv[2]), int(sys.argv[3])))))
