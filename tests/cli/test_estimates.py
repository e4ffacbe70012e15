"""What work would take is said before anything is written, and what is kept can be listed and removed."""

from __future__ import annotations

import os
import time

import pytest

from lmvae_fast import caches
from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError, OutputError
from lmvae_fast.generation.estimates import check_estimate, estimate
from lmvae_fast.testing import make_model
from tests.cli.test_cli import as_json, call


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
