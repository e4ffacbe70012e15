"""What work would take is said before anything is written, and what is kept can be listed and removed."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

import lmvae_fast as lf
from lmvae_fast import caches
from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError, OutputError
from lmvae_fast.generation.estimates import check_estimate, estimate
from lmvae_fast.testing import SENTENCES, make_model
from tests.cli.test_cli import as_json, call
from tests.training.helpers import prompt_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("estimates") / "model"
    make_model("gpt2", latent_dim=4, max_len=12).save_pretrained(path, include_frozen=True)
    return path


def test_dry_runs_write_nothing(capsys, folder, tmp_path):
    output = tmp_path / "deep" / "out.jsonl"
    found = as_json(capsys, "generate", folder, "--prior", "1000", "--output", output, "--dry-run")
    assert (
        found["sentences"] == 1000
        and found["disk_bytes"] > 1000 * 12
        and found["disk_free"] > 0
        and found["model_bytes"] > 0
    )
    assert "disk free" in call(capsys, "generate", folder, "--prior", "1000", "--output", output, "--dry-run")[0]
    data = tmp_path / "data.txt"
    data.write_text(
        "".join(
            f"a {animal} eats {food}\n" for animal in ("cat", "dog", "bee") for food in ("meat", "corn", "rice", "figs")
        )
    )
    found = as_json(
        capsys, "train", "--data", data, "--encoder", folder / "encoder", "--decoder", folder / "decoder", "--latent-dim", "2",
        "--max-len", "8", "--max-steps", "7", "--batch-size", "2", "--output", tmp_path / "run", "--dry-run",
    )  # fmt: skip
    assert (
        found["steps"] == 7
        and found["seconds"] > 0
        and found["checkpoint_bytes"] > 3 * 4 * found["trainable_parameters"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.txt"]


def test_dry_runs_of_the_other_commands_write_nothing(capsys, folder, tmp_path):
    place = tmp_path / "given"
    place.mkdir()
    lf.PromptDataset(prompt_pairs(8)).write_jsonl(place / "pairs.jsonl")
    words = [f"word{i}" for i in range(12)]
    rows = [f"{word}\t{SENTENCES[i % 8]}" for i, word in enumerate(words)]
    (place / "definitions.tsv").write_text("\n".join(["lemma\tdefinition", *rows]) + "\n")
    vectors = np.random.default_rng(0).normal(size=(11, 5)).astype(np.float32)
    lf.WordVectors(words[:-1], vectors).save(place / "vectors.safetensors")
    vae = make_model(latent_dim=4, max_len=12)
    vae.posterior_head.weight.data.mul_(3)
    vae.save_pretrained(place / "vae", include_frozen=True)
    new = tmp_path / "new"

    tune = ("--data", place / "pairs.jsonl", "--decoder", folder / "decoder", "--max-len", 9, "--max-steps", 5)
    found = as_json(capsys, "finetune", *tune, "--output", new, "--dry-run")
    assert found["steps"] == 5 and found["trainable_parameters"] == found["parameters"] and found["seconds"] > 0
    fit = ("fit-flow", place / "vae", "--data", place / "definitions.tsv", "--vectors", place / "vectors.safetensors",
           "--output", new, "--max-steps", 7, "--blocks", 2, "--hidden", 8, "--shares", "0.6,0.2,0.2", "--skip-missing",
           "--set", "train.tensorboard=false", "--all")  # fmt: skip
    estimated = as_json(capsys, *fit, "--dry-run")
    assert estimated["definitions"] == 12 and estimated["skipped"] == 1 and estimated["steps"] == 7
    assert "disk free" in call(capsys, *fit, "--dry-run")[0]
    sizes = {}
    for to in ("lmvae_fast", "langvae"):
        sizes[to] = as_json(capsys, "convert", folder, new, "--to", to, "--dry-run")
        assert sizes[to]["disk_bytes"] > 0 and not new.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given"]

    # what is written then is what was estimated
    done = as_json(capsys, *fit)
    assert done["parameters"] == estimated["trainable_parameters"] and done["definitions"] == estimated["definitions"]
    newest = sorted((new / "checkpoints").iterdir())[-1]
    held = sum(path.stat().st_size for path in newest.iterdir())
    assert 0.3 * estimated["checkpoint_bytes"] < held <= estimated["checkpoint_bytes"]
    for to in sizes:
        as_json(capsys, "convert", folder, tmp_path / to, "--to", to)
        held = sum(path.stat().st_size for path in (tmp_path / to).rglob("*") if path.suffix in (".safetensors", ".pt"))
        assert held == pytest.approx(sizes[to]["disk_bytes"], rel=0.2)
    with pytest.raises(AssertionError, match="neither empty"):  # what is refused is refused in a dry run, too
        as_json(capsys, "finetune", *tune, "--output", place, "--dry-run")


def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path, monkeypatch):
    config = GenerationConfig()
    many = estimate(10**15, config, 32, tmp_path / "out.jsonl", text_only=False)
    with pytest.raises(OutputError, match="may not fit"):
        check_estimate(many, tmp_path / "out.jsonl", as_json=False)
    with pytest.raises(ConfigError, match="--output"):
        check_estimate(estimate(10**15, config, 32, None, text_only=False), None, as_json=False)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**18}))
    with pytest.warns(UserWarning, match="is that meant"):
        check_estimate(
            estimate(2 * 10**9, config, 32, tmp_path / "o.txt", text_only=True), tmp_path / "o.txt", as_json=False
        )


def test_caches_are_listed_and_pruned(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LMVAE_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "cache" / "gguf" / ("a" * 32)
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (tmp_path / "cache" / "logs").mkdir()
    (tmp_path / "cache" / "logs" / "fault-20260101-000000-1.log").write_text("x")
    for name in ("mine.txt", "logs/notes.txt", "gguf/mine"):
        (tmp_path / "cache" / name).write_text("mine")
    found = as_json(capsys, "cache", "list")
    assert {entry["kind"] for entry in found["entries"]} == {"model", "log"} and found["bytes"] == 3
    old = time.time() - 40 * 86400
    os.utime(model, (old, old))
    assert len(as_json(capsys, "cache", "prune", "--dry-run")["entries"]) == 1 and model.is_dir()
    assert "removed: 1" in call(capsys, "cache", "prune")[0] and not model.exists()
    as_json(capsys, "cache", "prune", "--older-than", "0")
    left = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert left == ["cache/gguf/mine", "cache/logs/notes.txt", "cache/mine.txt"]
    with pytest.raises(ConfigError, match="no run"):
        caches.entries(tmp_path)
