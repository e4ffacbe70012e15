"""Folders of Invertible CVAEs: saved and loaded, tied to their VAE and their word vectors, damaged."""

from __future__ import annotations

import json

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.errors import CheckpointError, ConfigError, OutputError
from lmvae_fast.models.flow_files import spec_from_json, spec_to_json
from lmvae_fast.models.systems.invertible_cvae import InvertibleCVAE, build_flow
from lmvae_fast.testing import make_model
from tests.models.test_invertible_cvae import KINDS, SMALL, fitted, table


@pytest.mark.parametrize(
    ("dim", "config"),
    [
        (9, {"kind": "glow"}),
        (4, {"permutation": "soft", "conditions": ("n", "v")}),
        (6, {"kind": "allinone", "clamp": 1.5}),
    ],
)
def test_saved_and_loaded_it_says_the_same(tmp_path, dim, config):
    vae = make_model(max_len=12).eval()
    model = fitted(vae, dim, **config)
    labels = ["n", "v", "n"] if "conditions" in config else None
    model.save_pretrained(tmp_path / "flow")
    again = InvertibleCVAE.from_pretrained(tmp_path / "flow")
    words = ["moon", "cat", "sun"]
    x = model.vectors.lookup(words).vectors
    assert torch.equal(again.latents(x, labels), model.latents(x, labels))
    assert again.define(words, conditions=labels) == model.define(words, conditions=labels)
    assert again.config == model.config and again.flow.spec == model.flow.spec
    again.save_pretrained(tmp_path / "flow")  # in place of the first
    assert InvertibleCVAE.from_pretrained(tmp_path / "flow", vae=vae).define(words, conditions=labels)


def test_a_flow_of_another_vae_is_refused(tmp_path):
    vae = make_model(max_len=12).eval()
    vae.save_pretrained(tmp_path / "vae", include_frozen=True)
    model = fitted(vae)
    model.source = str(tmp_path / "vae")
    model.save_pretrained(tmp_path / "flow")
    assert not (tmp_path / "flow" / "vae").exists()
    InvertibleCVAE.from_pretrained(tmp_path / "flow")
    with torch.no_grad():
        vae.posterior_head.weight[0, 0] += 1e-3
    for other in (vae, make_model(max_len=12, latent_dim=7)):
        with pytest.raises(CheckpointError, match="another VAE"):
            InvertibleCVAE.from_pretrained(tmp_path / "flow", vae=other)
    vae.save_pretrained(tmp_path / "vae", include_frozen=True)  # trained further where it lies
    with pytest.raises(CheckpointError, match="another VAE"):
        InvertibleCVAE.from_pretrained(tmp_path / "flow")


def test_damaged_folders(tmp_path):
    vae = make_model(max_len=12).eval()
    model = fitted(vae)
    with pytest.raises(ConfigError, match="not fitted yet"):
        InvertibleCVAE(vae, lf.FlowConfig(**SMALL)).save_pretrained(tmp_path / "flow")
    model.save_pretrained(tmp_path / "flow", include_vae=False)
    with pytest.raises(CheckpointError, match="does not say where its VAE is"):
        InvertibleCVAE.from_pretrained(tmp_path / "flow")
    weights, config = tmp_path / "flow" / "flow.safetensors", tmp_path / "flow" / "config.json"
    whole, values = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[:-8] + b"12345678")
    with pytest.raises(CheckpointError, match="sha256"):
        InvertibleCVAE.from_pretrained(tmp_path / "flow", vae=vae)
    weights.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match="truncated"):
        InvertibleCVAE.from_pretrained(tmp_path / "flow", vae=vae)
    weights.write_bytes(whole)
    config.write_text(json.dumps({**values, "spec": {**values["spec"], "dim": 5}}))
    with pytest.raises((CheckpointError, ConfigError), match="flow"):
        InvertibleCVAE.from_pretrained(tmp_path / "flow", vae=vae)
    table(6, seed=1).save(tmp_path / "flow" / "word_vectors.safetensors")
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"word vectors.*others"):
        InvertibleCVAE.from_pretrained(tmp_path / "flow", vae=vae)
    with pytest.raises(CheckpointError, match=r"no flow of ours|missing or unreadable"):
        InvertibleCVAE.from_pretrained(tmp_path)
    with pytest.raises(OutputError, match="no flow of ours"):
        model.save_pretrained(tmp_path)
    (tmp_path / "flow" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        model.save_pretrained(tmp_path / "flow")


@pytest.mark.parametrize("kind", KINDS)
def test_stages_as_json(kind):
    spec = build_flow(lf.FlowConfig(kind=kind, conditions=("a",), **SMALL), 7).spec
    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec
    with pytest.raises(CheckpointError, match="stages"):
        spec_from_json({"dim": 3})
