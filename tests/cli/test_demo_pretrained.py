"""The demonstration on a pretrained decoder: our preset, its report, and no eager comparison."""

from __future__ import annotations

import json
import sys

import pytest

from lmvae_fast.cli.app import main
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.testing import tiny_decoder, tiny_encoder, tiny_tokenizer


def test_a_pretrained_decoder_gets_our_preset(tmp_path, capsys, monkeypatch):
    tokenizer = tiny_tokenizer()
    for name, model in (("encoder", tiny_encoder), ("decoder", tiny_decoder)):
        family = {"encoder": "bert", "decoder": "llama"}[name]
        model(family, vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    parts = ["--encoder", str(tmp_path / "encoder"), "--decoder", str(tmp_path / "decoder")]
    output = tmp_path / "demo"
    options = ["--output", str(output), "--steps", "2", "--sentences", "80", "--json"]
    monkeypatch.setattr(sys, "argv", ["lmvae-fast", "demo", *parts, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = json.loads(capsys.readouterr().out)
    assert said["steps"] == 2 and len(said["prior"]) == 8 and "parity" not in said
    page = (output / "report.html").read_text()
    for heading in ("Held-out sentences", "The latent space", "Interpolation", "The prior"):
        assert f"<h2>{heading}</h2>" in page
    assert "eager reference" not in page and "low-rank adapters" in page
    model = LMVAE.from_pretrained(output / "model")
    assert model.config.system == "lmvae" and model.config.memory_init == "sink" and model.posterior_head.fitted
