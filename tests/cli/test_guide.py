"""Answers moved along the direction of a label, by the command."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import lmvae_fast as lf
from lmvae_fast.exploration.guided import fit_label_classifier, guided, label_directions
from lmvae_fast.testing import make_model
from tests.cli.test_cli import as_json, call
from tests.exploration.test_guided import PAIRS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of prompts and a file of labelled responses."""
    folder = tmp_path_factory.mktemp("guide")
    make_model("llama", system="cvae", latent_dim=6, queries=2).eval().save_pretrained(folder / "model")
    lf.PromptDataset(PAIRS).write_jsonl(folder / "pairs.jsonl")
    return folder


def test_guide(place, capsys):
    out = as_json(
        capsys, "guide", place / "model", "--data", place / "pairs.jsonl", "--label", "v", "--strength", 3, "--count", 2,
        "--save", place / "directions.safetensors",
    )  # fmt: skip
    model, data = lf.LMVAE.from_pretrained(place / "model"), lf.read_prompts(place / "pairs.jsonl")
    directions = label_directions(model, data, fit_label_classifier(model, data))
    want = guided(model, list(data)[:2], directions["v"], strength=3.0)
    assert [row["guided"] for row in out["responses"]] == [{"v": text} for text in want]
    assert out["labels"] == ["n", "v"] and [row["prompt"] for row in out["responses"]] == [PAIRS[0].prompt] * 2
    saved = load_file(place / "directions.safetensors")
    assert saved.keys() == {"n", "v"} and torch.allclose(saved["v"], directions["v"], atol=1e-6)
    assert float(saved["v"].norm()) == pytest.approx(1.0, abs=1e-5)
    sampled = place / "sampled.jsonl"
    rows = [{"prompt": pair.prompt, "response": pair.response, "tokens": 2} for pair in PAIRS[:5]]
    sampled.write_text("\n".join(map(json.dumps, rows)))
    text, _ = call(capsys, "guide", place / "model", "--data", place / "pairs.jsonl", "--responses", sampled)
    assert "towards n" in text and "towards v" in text


def test_what_is_refused(place, capsys, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "sentences")
    pairs = place / "pairs.jsonl"
    _, said = call(capsys, "guide", tmp_path / "sentences", "--data", pairs, code=3)
    assert "model of prompts" in said and "--system cvae" in said
    _, said = call(capsys, "guide", place / "model", "--data", pairs, "--label", "x", code=3)
    assert "no such label" in said and "n, v" in said
    _, said = call(capsys, "guide", place / "model", "--data", pairs, "--save", tmp_path / "a.pt", code=3)
    assert "safetensors" in said
