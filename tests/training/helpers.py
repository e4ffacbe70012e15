"""What the tests of the loop share: quick runs, and exact comparison of what runs leave behind."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import load_file

from lmvae_fast.config import TrainConfig
from lmvae_fast.data import PromptResponse
from lmvae_fast.testing import SENTENCES
from lmvae_fast.training import Callback, train
from lmvae_fast.training.callbacks import read_records
from tests.training.fake_model import FakeModel, sentences

TIMING = ("seconds", "tokens_per_second", "pairs_per_second")


def settings(folder: Path, **changes) -> TrainConfig:
    """A run of 24 steps (3 epochs of 8) that uses noise, dropout, warm-up and a beta that moves."""
    options = {
        "output_dir": str(folder), "epochs": 3, "batch_size": 8, "learning_rate": 0.05, "schedule": "cosine",
        "warmup_steps": 3, "beta_cycles": 2, "log_every": 5, "tensorboard": False, "progress": False,
    }  # fmt: skip
    return TrainConfig(**{**options, **changes})


def run(folder: Path, *callbacks, model=None, evaluated: bool = True, **changes):
    """Train on 60 sentences, evaluate on 20."""
    make = sentences if model is None or isinstance(model, FakeModel) else plain_sentences
    eval_data = make(20, seed=1) if evaluated else None
    return train(model or FakeModel(), make(60), eval_data, settings(folder, **changes), callbacks)


def plain_sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of 2 to 7 words that the tiny tokenizer has whole tokens for."""
    words = " ".join(SENTENCES).split()
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(2, 7))) for _ in range(count)]


def prompt_pairs(prompts: int, seed: int = 0) -> list[PromptResponse]:
    """Prompts of 2 to 4 words with 1 to 5 responses each, not side by side."""
    words = " ".join(SENTENCES).split()
    draw = random.Random(seed)
    rows = []
    for number in range(prompts):
        prompt = " ".join(
            [words[number % len(words)], words[number // len(words)], *draw.choices(words, k=draw.randint(1, 2))]
        )
        rows += [PromptResponse(prompt, " " + text) for text in plain_sentences(draw.randint(1, 5), seed=number)]
    draw.shuffle(rows)
    return rows


class StopAt(Callback):
    """Ends the run in order after given steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step(self, run) -> None:
        if run.step in self.steps:
            run.request_stop("test")


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Weights, optimizer and random states equal to the bit."""
    for name in ("model", "optimizer", "random"):
        one, two = load_file(first / f"{name}.safetensors"), load_file(second / f"{name}.safetensors")
        assert one.keys() == two.keys()
        for key in one:
            assert torch.equal(one[key], two[key]), f"{name}: {key} differs"


def untimed(history: list[dict]) -> list[dict]:
    """Records without what depends on the clock."""
    return [{key: value for key, value in record.items() if key not in TIMING} for record in history]


def assert_same_history(first: Path, second: Path) -> None:
    one, two = (untimed(read_records(folder / "metrics.jsonl")) for folder in (first, second))
    assert one
    assert one == two
