"""Checkpoints in the layout of Optimus's public code, made here, as our models: the same figures, and refusals by name."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lmvae_fast as lf
from lmvae_fast.cli.app import app
from lmvae_fast.errors import CheckpointError
from lmvae_fast.integrations.optimus import load_checkpoint
from lmvae_fast.integrations.optimus.model import SPECIAL_TOKENS
from lmvae_fast.reference.optimus import ReferenceOptimus
from lmvae_fast.testing import SENTENCES, tiny_decoder, tiny_encoder, tiny_tokenizer

NZ, TEXTS = 6, list(SENTENCES[:4])
ARGS = {
    "latent_size": NZ,
    "block_size": 20,
    "latent_as_gpt_memory": 1,
    "latent_as_gpt_emb": 1,
    "device": torch.device("cpu"),
}


class Published:
    """The eager Optimus, the base models it began from, and its state dicts by half as the public code names them."""

    def __init__(self, root: Path):
        size = len(tiny_tokenizer())
        for name, model in (
            ("bert", tiny_encoder("bert", vocab_size=size)),
            ("gpt2", tiny_decoder("gpt2", vocab_size=size)),
        ):
            model.save_pretrained(root / name)
            tiny_tokenizer().save_pretrained(root / name)
        self.bases = {"encoder": str(root / "bert"), "decoder": str(root / "gpt2")}
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens(SPECIAL_TOKENS)
        decoder = tiny_decoder("gpt2", vocab_size=len(tokenizer), seed=5)
        decoder.config.update({"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id})
        torch.manual_seed(3)
        self.reference = ReferenceOptimus(
            tiny_encoder("bert", vocab_size=size, seed=6),
            tiny_tokenizer(),
            decoder,
            tokenizer,
            latent_dim=NZ,
            max_len=18,
        ).eval()
        masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 128, 128).tril() for layer in range(3)}
        self.states: dict[str, dict[str, torch.Tensor]] = {
            "encoder": {**self.reference.encoder.state_dict(), "linear.weight": self.reference.linear.weight.detach()},
            "decoder": {
                **decoder.state_dict(), **masks,
                "transformer.linear.weight": self.reference.linear_memory.weight.detach(),
                "transformer.linear_emb.weight": self.reference.linear_embedding.weight.detach(),
            },
        }  # fmt: skip

    def whole(self, prefix: str = "") -> dict[str, torch.Tensor]:
        return {f"{prefix}{half}.{name}": value for half, state in self.states.items() for name, value in state.items()}

    def write_full(
        self, folder: Path, *, args: dict[str, Any] | None = None, legacy: bool = False, **changed: Any
    ) -> Path:
        """checkpoint-full-31 in a folder, and the configuration of the encoder beside it."""
        stored = {
            "iter": 31, "model_state_dict": self.whole(), "optimizer_state_dict": {"state": {}}, "beta": 1.0,
            "args": argparse.Namespace(**(ARGS if args is None else args)), **changed,
        }  # fmt: skip
        place = folder / "checkpoint-full-31"
        place.mkdir(parents=True)
        torch.save(stored, place / "training.bin", _use_new_zipfile_serialization=not legacy)
        return folder

    def write_halves(self, folder: Path, step: int = 31) -> Path:
        for half, state in self.states.items():
            place = folder / f"checkpoint-{half}-{step}"
            place.mkdir(parents=True)
            torch.save(state, place / "pytorch_model.bin")
            config = {"encoder": {"num_attention_heads": 2, "hidden_act": "gelu"}, "decoder": {"n_head": 4}}[half]
            (place / "config.json").write_text(json.dumps(config))
        return folder


@pytest.fixture
def published(tmp_path) -> Published:
    return Published(tmp_path / "bases")


def assert_same_figures(model: lf.LMVAE, reference: ReferenceOptimus, **options: Any) -> None:
    eps = torch.randn(len(TEXTS), NZ, generator=torch.Generator().manual_seed(1))
    ours = model(model.make_batch(model.tokenize(TEXTS)), beta=0.5, eps=eps)
    theirs = reference.loss(TEXTS, beta=0.5, eps=eps, **options)
    torch.testing.assert_close(ours.mu, theirs.mu, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.kl, theirs.kl, rtol=1e-5, atol=1e-6)
    assert model.decode(theirs.z, max_new_tokens=8) == [
        reference.generate(row, max_new_tokens=8).strip() for row in theirs.z
    ]


LAYOUTS: dict[str, Callable[[Published, Path], Path]] = {
    "the folder of a step": lambda p, folder: p.write_full(folder),
    "the whole VAE's folder": lambda p, folder: p.write_full(folder) / "checkpoint-full-31",
    "training.bin itself": lambda p, folder: p.write_full(folder) / "checkpoint-full-31" / "training.bin",
    "a file of torch before 1.6": lambda p, folder: p.write_full(folder, legacy=True),
    "trained on several GPUs": lambda p, folder: p.write_full(folder, model_state_dict=p.whole("module.")),
    "both halves": lambda p, folder: p.write_halves(folder),
    "both halves and the whole": lambda p, folder: p.write_full(p.write_halves(folder)),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_checkpoint_gives_the_figures_of_the_eager_optimus(published, tmp_path, layout):
    model = load_checkpoint(LAYOUTS[layout](published, tmp_path / "checkpoint"), **published.bases, kl_target=0.5)
    assert not model.training
    assert_same_figures(model, published.reference)
    assert model.decoder.tokenizer.eos_token_id == len(tiny_tokenizer()) + 2
    assert (model.config.count_start_token, model.config.latent_init) == (True, "normal")
    # halves record no block size: the published runs' 100 then, two of them for the start and for what was dropped
    assert model.config.max_len == (98 if layout == "both halves" else 18)


def test_recorded_options_are_honoured(published, tmp_path):
    args = {**ARGS, "latent_as_gpt_emb": 0, "length_weighted_loss": True, "dim_target_kl": 0.25, "block_size": 42}
    model = load_checkpoint(published.write_full(tmp_path / "checkpoint", args=args), **published.bases)
    config = model.config
    assert (config.embedding_shift, config.length_normalize, config.kl_target, config.max_len) == (
        False,
        True,
        0.25,
        40,
    )
    assert model.embedding_shift is None
    published.reference.linear_embedding = None
    batch = model.make_batch(model.tokenize(TEXTS))
    eps = torch.zeros(len(TEXTS), NZ)
    theirs = published.reference.loss(TEXTS, beta=1.0, eps=eps).reconstruction / (batch.tokens + 1)
    torch.testing.assert_close(model(batch, beta=1.0, eps=eps).reconstruction, theirs, rtol=1e-5, atol=0)
    other = {**ARGS, "latent_as_gpt_memory": False}
    model = load_checkpoint(published.write_full(tmp_path / "other", args=other), **published.bases)
    assert model.projector is None and model.config.projector == "none"


def test_the_command_converts_and_the_model_reloads(published, tmp_path):
    source, target = published.write_full(tmp_path / "checkpoint"), tmp_path / "model"
    parts = [word for name, path in published.bases.items() for word in (f"--{name}", path)]
    done = CliRunner().invoke(app, ["convert", str(source), str(target), *parts, "--json"])
    assert done.exit_code == 0, done.output
    for base in published.bases.values():  # the model holds all of itself
        os.rename(base, base + ".gone")
    assert_same_figures(lf.LMVAE.from_pretrained(target), published.reference)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def with_weight(half: str, name: str, value: torch.Tensor | None) -> Callable[[Published, Path], Path]:
    def write(published: Published, folder: Path) -> Path:
        if value is None:
            del published.states[half][name]
        else:
            published.states[half][name] = value
        return published.write_full(folder)

    return write


def two_steps(published: Published, folder: Path) -> Path:
    (published.write_full(folder) / "checkpoint-full-31").rename(folder / "checkpoint-full-62")
    return published.write_full(folder)


def truncated(published: Published, folder: Path) -> Path:
    file = published.write_full(folder) / "checkpoint-full-31" / "training.bin"
    file.write_bytes(file.read_bytes()[:-2000])
    return folder


def other_heads(published: Published, folder: Path) -> Path:
    published.write_halves(folder)
    (folder / "checkpoint-decoder-31" / "config.json").write_text('{"n_head": 8}')
    return folder


def rows(published: Published, folder: Path) -> Path:
    state = published.states["decoder"]
    state["transformer.wte.weight"] = state["lm_head.weight"] = state["lm_head.weight"][:-1].clone()
    return published.write_full(folder)


BAD: dict[str, tuple[Callable[[Published, Path], Path], tuple[str, ...]]] = {
    "missing": (
        with_weight("decoder", "transformer.h.1.mlp.c_fc.bias", None), ("decoder is not a", "transformer.h.1.mlp.c_fc.bias"),
    ),
    "foreign": (with_weight("encoder", "adapter.weight", torch.zeros(2)), ("encoder is not a", "adapter.weight")),
    "another shape": (
        with_weight("encoder", "pooler.dense.weight", torch.zeros(7, 7)), ("pooler.dense.weight", "[7, 7]"),
    ),
    "no number": (
        with_weight("decoder", "transformer.ln_f.weight", torch.full((32,), float("nan"))), ("transformer.ln_f.weight", "NaN"),
    ),
    "a head of its own": (
        with_weight("decoder", "lm_head.weight", torch.zeros(len(tiny_tokenizer()) + 3, 32)), ("head", "ties"),
    ),
    "no posterior": (with_weight("encoder", "linear.weight", None), ("no", "linear.weight")),
    "memory of other layers": (
        with_weight("decoder", "transformer.linear.weight", torch.zeros(64, NZ)), ("transformer.linear.weight", "[64, 6]"),
    ),
    "a third part": (
        lambda p, folder: p.write_full(folder, model_state_dict={**p.whole(), "critic.weight": torch.zeros(1)}),
        ("critic.weight", "encoder.*"),
    ),
    "options of another model": (
        lambda p, folder: p.write_full(folder, args={**ARGS, "latent_size": 768}), ("latent_size 768", "6"),
    ),
    "several steps": (two_steps, ("several steps", "checkpoint-full-31, checkpoint-full-62")),
    "truncated": (truncated, ("training.bin", "truncated")),
    "other heads": (other_heads, ("n_head=8", "n_head=4")),
    "another vocabulary": (rows, ("tokenizer", "<BOS>")),
    "only one half": (
        lambda p, folder: (p.write_halves(folder) / "checkpoint-decoder-31").rename(folder / "elsewhere").parent,
        ("no folder of the decoder",),
    ),
    "nothing": (lambda p, folder: folder, ("no checkpoint of Optimus", "training.bin")),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_what_does_not_fit_is_refused_by_name(published, tmp_path, case):
    write, words = BAD[case]
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(write(published, tmp_path / "checkpoint"), **published.bases)
    for word in words:
        assert word in str(refused.value), str(refused.value)


def test_nothing_but_tensors_and_values_is_unpickled(published, tmp_path):
    trap = tmp_path / "it ran"
    source = published.write_full(tmp_path / "checkpoint", args={**ARGS, "hook": Touch(trap)})
    with pytest.raises(CheckpointError, match="nothing else is unpickled"):
        load_checkpoint(source, **published.bases)
    assert not trap.exists()
