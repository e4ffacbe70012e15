"""Kill writers at every file operation, one after the other, and look whether anything is lost.

    python -m tests.training.operation_kills FOLDER MOST [TASK ...]

A task is a writer over what an earlier one left: it is run once to count its file operations (opening for writing, fsync,
renaming, exchanging, removing, making folders, truncating), and then once for each of them, or for MOST of them evenly spaced,
in a child that kills itself there. After every kill the task's own check says whether what was there before, or what was being
written, is whole, and whether going on ends as if nothing had happened. Prints one line of JSON: kills by task.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import lmvae_fast as lf
from lmvae_fast import files
from lmvae_fast.cli import main as command_line
from lmvae_fast.generation.latent_sources import latents_of_prior
from lmvae_fast.generation.text_files import generate_file
from lmvae_fast.integrations.langvae import load_checkpoint, save_checkpoint
from lmvae_fast.testing import make_model, tiny_decoder, tiny_encoder, tiny_tokenizer
from lmvae_fast.training.checkpoints import folder as checkpoint
from tests.training.helpers import assert_same_checkpoint, assert_same_history, plain_sentences, prompt_pairs
from tests.training.kill_server import train_once

EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Task(NamedTuple):
    """prepare(folder): what is there before. act(folder): the writer. check(folder, whole): after a kill; ``whole`` is a folder
    in which the writer came to its end."""

    prepare: Callable[[Path], None]
    act: Callable[[Path], None]
    check: Callable[[Path, Path], None]


def watch(folder: Path, at: int | None) -> list[int]:
    """From now on this process counts its file operations below a folder, in the one entry returned, and dies at the given."""
    count = [0]

    def step() -> None:
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if (
                isinstance(path, (str, bytes))
                and isinstance(flags, int)
                and flags & WRITING
                and below(os.fsdecode(path))
            ):
                step()
        elif (
            event in EVENTS and isinstance(arguments[0], (str, bytes, os.PathLike)) and below(os.fsdecode(arguments[0]))
        ):
            step()

    def below(path: str) -> bool:
        return os.path.abspath(path).startswith(str(folder))

    def stepping(function: Callable) -> Callable:
        def wrapped(*arguments, **options):
            step()
            result = function(*arguments, **options)
            step()
            return result

        return wrapped

    sys.addaudithook(hook)
    os.fsync = stepping(os.fsync)
    files.exchange = stepping(files.exchange)
    return count


def child(act: Callable[[Path], None], folder: Path, at: int | None) -> int:
    """Act in a child that dies at an operation, or in one that lives; how many operations there were (-1: it was killed)."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            count = watch(folder, at)
            act(folder)
            os.write(writing, str(count[0]).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    told = os.read(reading, 32)
    os.close(reading)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a child ended by itself with code {code}")
    return int(told) if code == 0 else -1


def trained(kind: str) -> Task:
    """Training that goes on from a run of a few steps."""
    options = {"resume": True, "save_every": 6, "eval_every": 12}

    def check(folder: Path, whole: Path) -> None:
        train_once(folder / "run", kind, **options)
        one, two = (checkpoint.complete(place / "run" / "checkpoints")[0] for place in (folder, whole))
        assert_same_checkpoint(one, two)
        assert_same_history(folder / "run", whole / "run")

    return Task(lambda folder: None, lambda folder: train_once(folder / "run", kind, **options), check)


def weights(model: lf.LMVAE) -> bytes:
    """What tells two models apart."""
    return b"".join(bytes(files.tensor_bytes(value)) for value in model.trainable_state_dict().values())


def saved(save: Callable, load: Callable, models: list[lf.LMVAE]) -> Task:
    """A model that takes the place of another one: at every instant one of the two is there."""
    known = [weights(model) for model in models]

    def check(folder: Path, whole: Path) -> None:
        assert weights(load(folder / "model")) in known
        save(models[1], folder / "model")
        assert weights(load(folder / "model")) == known[1]
        left = sorted(path.name for path in folder.iterdir())
        assert left == ["model"], left

    return Task(
        lambda folder: save(models[0], folder / "model"), lambda folder: save(models[1], folder / "model"), check
    )


def generated(model: lf.LMVAE) -> Task:
    """A file of texts that is begun, killed and continued."""
    config = lf.GenerationConfig(batch_size=1)

    def act(folder: Path) -> None:
        generate_file(model, latents_of_prior(40, model.config.latent_dim, 0), folder / "out.jsonl", config)

    def check(folder: Path, whole: Path) -> None:
        act(folder)
        assert (folder / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()

    return Task(lambda folder: None, act, check)


def commanded(words: list[str]) -> Task:
    """A command line that trains into RUN, is killed, and is given again; it ends with the same weights, saved twice."""

    def act(folder: Path) -> None:
        sys.argv = ["lmvae-fast", *words, "--output", str(folder / "run"), "--resume", "--json"]
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            try:
                command_line()
            except SystemExit as end:
                if end.code:
                    raise RuntimeError(f"{words[0]} ended with {end.code}") from end

    def check(folder: Path, whole: Path) -> None:
        child(act, folder, None)  # in a child: a command leaves settings of its process behind
        one, two = (checkpoint.complete(place / "run" / "checkpoints")[0] for place in (folder, whole))
        assert_same_checkpoint(one, two)
        assert_same_history(folder / "run", whole / "run")
        assert contents(folder / "run" / "model") == contents(whole / "run" / "model")
        left = [path for path in folder.rglob("*") if path.name.startswith(files.TEMPORARY)]
        assert not left, left

    return Task(lambda folder: None, act, check)


def contents(folder: Path) -> dict[str, str]:
    """The files of a folder and their hashes."""
    return {str(path.relative_to(folder)): files.sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def commands(folder: Path) -> dict[str, Task]:
    """The further trainings, as they are asked for on the command line."""
    tokenizer, decoder, data = tiny_tokenizer(), folder / "decoder", folder / "pairs.jsonl"
    tiny_decoder("llama", vocab_size=len(tokenizer)).save_pretrained(decoder)
    tokenizer.save_pretrained(decoder)
    tiny_encoder("bert", vocab_size=len(tokenizer)).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    lf.PromptDataset(prompt_pairs(12)).write_jsonl(data)
    (folder / "sentences.txt").write_text("\n".join(plain_sentences(40)) + "\n")
    common = ["--decoder", str(decoder), "--max-len", "9", "--max-steps", "6", "--set", "train.save_every=2"]
    common += ["--set", "train.eval_every=3", "--set", "train.log_every=2"]
    pairs = ["--data", str(data), "--max-prompt-len", "12"]
    sentences = ["--data", str(folder / "sentences.txt"), "--encoder", str(folder / "encoder"), "--latent-dim", "6"]
    return {
        "cvae": commanded(["train", "--system", "cvae", *pairs, "--latent-dim", "8", *common]),
        "llamavae": commanded(["train", "--system", "llamavae", *sentences, *common, "--batch-size", "8"]),
        "finetune": commanded(["finetune", *pairs, *common, "--batch-size", "8"]),
    }


def tasks(folder: Path) -> dict[str, Task]:
    """All of them, by name; what they need lies in a folder."""
    models = [make_model("gpt2", latent_dim=4, max_len=8, seed=seed).eval() for seed in range(2)]
    whole: dict = {"include_frozen": True}
    return {
        "train": trained("fake"),
        "flow": trained("flow"),
        "generate": generated(models[0]),
        "save_pretrained": saved(
            lambda model, folder: model.save_pretrained(folder, **whole), lf.LMVAE.from_pretrained, models
        ),
        "convert": saved(
            lambda model, folder: save_checkpoint(model, folder, overwrite=True),
            load_checkpoint,
            of_folders(models, folder),
        ),
        **commands(folder),
    }


def of_folders(models: list[lf.LMVAE], folder: Path) -> list[lf.LMVAE]:
    """The models with parts that lie in folders, which LangVAE's checkpoints refer to."""
    for number, model in enumerate(models):
        model.save_pretrained(folder / str(number), include_frozen=True)
    return [lf.LMVAE.from_pretrained(folder / str(number)) for number in range(len(models))]


def main(folder: Path, most: int, names: list[str]) -> dict[str, int]:
    kills = {}
    for name, task in tasks(folder / "parts").items():
        if names and name not in names:
            continue
        start, whole = folder / name / "start", folder / name / "whole"
        start.mkdir(parents=True)
        task.prepare(start)
        shutil.copytree(start, whole)
        count = child(task.act, whole, None)
        places = sorted({1 + i * count // min(most, count) for i in range(min(most, count))})
        kills[name] = 0
        for at in places:
            place = folder / name / f"at-{at}"
            shutil.copytree(start, place)
            if child(task.act, place, at) == -1:
                kills[name] += 1
            try:
                task.check(place, whole)
            except BaseException:
                print(f"{name}, killed at operation {at} of {count}: see {place}", file=sys.stderr)
                raise
            shutil.rmtree(place)
    return kills


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), sys.argv[3:])))
