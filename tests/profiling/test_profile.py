"""Profiles of a training step: parts that add up, records that can be read, errors that help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lmvae_fast.cli.app import app
from lmvae_fast.config import LMVAEConfig, TrainConfig
from lmvae_fast.data import generate_corpus
from lmvae_fast.errors import ConfigError
from lmvae_fast.files import MARK
from lmvae_fast.profiling import train as profiling
from lmvae_fast.profiling.cost import Cost
from lmvae_fast.profiling.eager import EagerStep
from lmvae_fast.profiling.parts import PARTS, Parts, watching
from lmvae_fast.profiling.presets import random_model
from lmvae_fast.profiling.step import TrainingStep
from tests.cli.test_cli import call

TEXTS = list(generate_corpus(64, seed=0).texts)
TRAIN = TrainConfig(batch_size=8, learning_rate=1e-4, max_steps=100)
LIMITS = {
    "copy_bytes_per_s": 1e10, "matmul_float32_flops_per_s": 1e11, "matmul_bfloat16_flops_per_s": 1e11
}  # fmt: skip


def tiny(system="langvae", **options):
    return random_model("tiny", "tiny", LMVAEConfig(system=system, latent_dim=8, max_len=16, **options), TEXTS)


@pytest.fixture(autouse=True)
def _no_long_measurements(monkeypatch):
    monkeypatch.setattr(profiling, "machine_limits", lambda *_: LIMITS)


@pytest.mark.parametrize(
    ("system", "options", "reference"),
    [
        ("langvae", {}, "token by token"),
        ("optimus", {}, "Optimus"),
        ("langvae", {"visibility": "prefix", "slots": 2}, "plain torch"),
    ],
)
def test_profile_of_both_sides(tmp_path, system, options, reference):
    found = profiling.profile_train(tiny(system, **options), TEXTS, TRAIN, folder=tmp_path, seconds=0.0)
    json.dumps(found)
    assert reference in found["sides"]["reference"]["name"]
    assert found["speedup"] > 0
    for side in found["sides"].values():
        assert [row["part"] for row in side["parts"]] == list(PARTS)
        assert sum(row["share"] for row in side["parts"]) == pytest.approx(1.0)
        assert sum(row["seconds"] for row in side["parts"]) == pytest.approx(side["seconds"])
        assert sum(row["flops"] for row in side["parts"]) == side["flops"] > 0
        rows = {row["part"]: row for row in side["parts"]}
        for part in ("posterior", "latent_kv", "body", "head", "optimizer"):
            assert rows[part]["seconds"] > 0, part
        for part in ("latent_kv", "body", "head"):
            assert rows[part]["flops"] > 0, part
        events = json.loads(Path(side["trace"]).read_text())["traceEvents"]
        assert any(event.get("name") == "part:body" for event in events)
        assert side["peak_extra_bytes"] > 0
        assert side["joules"] is None
        assert "GPU" in side["no_energy_because"]


def test_backward_goes_to_the_part_that_made_it():
    """FLOPs by part of a frozen decoder are known by hand: the head's two products, latent_kv's forward and dz."""
    model = tiny(projector_dropout=0.0)
    parts = Parts()
    with TrainingStep(model, TEXTS, TRAIN) as step, watching(parts, model):
        batch = step.batch()
        with Cost(parts.now) as cost:
            model(batch, beta=1.0).loss.backward()
    head = model.decoder.head_weight
    weight = model.projector.weight
    seen = weight.numel() // model.config.slots * batch.max_seqlen  # slots that some token sees are made, and no others
    assert cost.flops["head"] == 2 * 2 * batch.num_tokens * head.numel()
    assert cost.flops["latent_kv"] == 2 * 2 * batch.batch_size * seen  # dW is the optimizer's, in its pass
    assert cost.flops["posterior"] == 2 * 2 * batch.batch_size * model.posterior_head.weight.numel()
    assert cost.flops["body"] > cost.flops["head"] / 4
    assert cost.flops["other"] == 0


def test_the_eager_step_trains_a_copy():
    model = tiny()
    before = {name: value.clone() for name, value in model.named_parameters()}
    step = EagerStep(model, TEXTS[:4], TRAIN)
    first = [parameter.detach().clone() for parameter in step.parameters]
    step()
    assert any(not torch.equal(a, b) for a, b in zip(first, step.parameters, strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_accumulation_is_refused():
    with pytest.raises(ConfigError, match="accumulation=2"):
        TrainingStep(tiny(), TEXTS, TRAIN.replace(accumulation=2))


def test_command_writes_report_record_and_traces(tmp_path):
    out = tmp_path / "profile"
    options = ["profile", "train", "--tiny", "--batch-size", "4", "--latent-dim", "8", "--max-len", "12"]
    result = CliRunner().invoke(app, [*options, "--seconds", "0", "--output", str(out), "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout[result.stdout.index("{") :])
    assert printed["sides"]["fast"]["seconds"] > 0
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "token by token" in page
    assert {path.name for path in out.iterdir()} == {
        MARK, "report.html", "profile.json", "trace-fast.json", "trace-reference.json"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name one model"),
        (["--tiny", "--preset", "tiny,tiny"], "name one model"),
        (["--preset", "gpt2"], "two names"),
        (["--preset", "tiny,gpt5"], "gpt5"),
        (["--tiny", "--system", "vae"], "vae"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, says):
    _, message = call(capsys, "profile", "train", "--batch-size", "2", *arguments, code=3)
    assert says in " ".join(message.split())


def test_too_few_sentences(capsys, tmp_path):
    (tmp_path / "few.txt").write_text("one sentence\nand another\n")
    _, message = call(capsys, "profile", "train", "--tiny", "--data", tmp_path / "few.txt", code=3)
    assert "--batch-size" in message
