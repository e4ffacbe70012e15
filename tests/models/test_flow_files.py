"""Folders of Invertible CVAEs: saved and loaded, tied to their VAE and their word vectors, damaged."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.data.word_vectors import EncoderVectors
from lmvae_fast.errors import CheckpointError, ConfigError, DataError, OutputError
from lmvae_fast.models.flow_files import spec_from_json, spec_to_json
from lmvae_fast.models.systems.invertible_cvae import InvertibleCVAE, build_flow
from lmvae_fast.models.vae_identity import NOT_OF_LATENTS, vae_fingerprint
from lmvae_fast.testing import make_model
from tests.models.test_invertible_cvae import KINDS, SMALL, WORDS, fitted, table


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


# ---- what a flow stands on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["limit", "select", "whole"])
def test_a_part_of_a_packages_table_is_stored_and_the_whole_is_named(tmp_path, monkeypatch, part):
    """A table that was limited or selected has its package's name, and is not what that name gives."""
    whole = table(6)
    whole.source = "glove"
    monkeypatch.setattr("lmvae_fast.models.flow_vectors.read_word_vectors", _reads({"glove": whole}))
    used = {"limit": table(6, WORDS[:5]), "select": whole.select(WORDS[3:]), "whole": whole}[part]
    used.source = "glove"
    model = fitted(make_model(max_len=12).eval())
    model.vectors = used
    model.save_pretrained(tmp_path / "flow")
    assert (tmp_path / "flow" / "word_vectors.safetensors").exists() == (part != "whole")
    again = InvertibleCVAE.from_pretrained(tmp_path / "flow")
    assert again.vectors.words == used.words and again.vectors.fingerprint() == used.fingerprint()
    again.save_pretrained(tmp_path / "again")
    assert InvertibleCVAE.from_pretrained(tmp_path / "again").vectors.fingerprint() == used.fingerprint()


def _reads(known):
    from lmvae_fast.data.word_vector_files import read_word_vectors

    return lambda source, **options: known.get(str(source)) or read_word_vectors(source, **options)


def test_vectors_that_a_name_does_not_give_again_are_asked_for(tmp_path):
    """Those of another model's encoder have the name of the VAE's own; a stranger's have a name that we know nothing of."""
    vae = make_model(max_len=12).eval()
    other = make_model(max_len=12, pooling="cls").eval()
    model = fitted(vae)
    for vectors, known in ((EncoderVectors(vae.encoder), True), (EncoderVectors(other.encoder), False)):
        model.bridge = None
        model.set_width(vectors.dim).fit(torch.from_numpy(vectors.lookup(WORDS).vectors))
        model.vectors = vectors
        model.save_pretrained(tmp_path / "flow")
        again = InvertibleCVAE.from_pretrained(tmp_path / "flow")
        assert (again.vectors is not None) == known
    again = InvertibleCVAE.from_pretrained(tmp_path / "flow", vectors=EncoderVectors(other.encoder))
    assert again.define(["galaxy"])
    with pytest.raises(CheckpointError, match="word vectors of encoder are others"):
        InvertibleCVAE.from_pretrained(tmp_path / "flow", vectors=EncoderVectors(vae.encoder))


def test_vectors_given_are_checked(tmp_path):
    model = fitted(make_model(max_len=12).eval())
    model.save_pretrained(tmp_path / "flow")
    assert InvertibleCVAE.from_pretrained(tmp_path / "flow", vectors=table(6)).vectors.source == "memory"
    with pytest.raises(CheckpointError, match=r"word vectors of memory are others.*define"):
        InvertibleCVAE.from_pretrained(tmp_path / "flow", vectors=table(6, seed=1))
    with pytest.raises(DataError, match="cannot be looked up"):
        InvertibleCVAE.from_pretrained(tmp_path / "flow", vectors="glove")
    (tmp_path / "flow" / "word_vectors.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing or unreadable.*no file"):
        InvertibleCVAE.from_pretrained(tmp_path / "flow")
    assert InvertibleCVAE.from_pretrained(tmp_path / "flow", vectors=table(6)).define(["cat"])
    model.vectors = table(5)
    with pytest.raises(ConfigError, match="of another width"):
        model.save_pretrained(tmp_path / "flow")


OTHERWISE = (
    {"pooling": "cls"}, {"normalize": True}, {"encoder_layer": 1}, {"visibility": "interleaved"}, {"max_len": 11},
)  # fmt: skip


@pytest.mark.parametrize("setting", OTHERWISE, ids=lambda setting: next(iter(setting)))
def test_a_vae_of_equal_weights_and_other_settings_is_another(tmp_path, setting):
    options = {"max_len": 12, "slots": 13, "pooling": "mean", "visibility": "rolling", "normalize": False}
    vae, other = make_model(**options).eval(), make_model(**{**options, **setting}).eval()
    assert vae_fingerprint(vae) == vae_fingerprint(other)
    fitted(vae).save_pretrained(tmp_path / "flow")
    name, value = next(iter(setting.items()))
    with pytest.raises(CheckpointError, match=f"another VAE.*got: {name}={value!r}"):
        InvertibleCVAE.from_pretrained(tmp_path / "flow", vae=other)
    # What it was trained by is no part of it.
    InvertibleCVAE.from_pretrained(
        tmp_path / "flow", vae=make_model(**options, token_dropout=0.3, kl_target=0.1).eval()
    )
    # A field that came later had what is its default now.
    config = tmp_path / "flow" / "config.json"
    values = json.loads(config.read_text())
    del values["vae_settings"]["pooling_segments"], values["vae_settings"]["encoder.lower"]
    config.write_text(json.dumps(values))
    InvertibleCVAE.from_pretrained(tmp_path / "flow", vae=vae)


def test_a_folder_from_before_the_settings_is_loaded_with_a_warning(tmp_path):
    fitted(make_model(max_len=12).eval()).save_pretrained(tmp_path / "flow")
    config = tmp_path / "flow" / "config.json"
    values = json.loads(config.read_text())
    del values["vae_settings"]
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"settings of the VAE.*unreadable"):
        InvertibleCVAE.from_pretrained(tmp_path / "flow")
    config.write_text(json.dumps({**values, "format": "lmvae_fast-flow-1"}))
    with pytest.warns(UserWarning, match="before the settings of its VAE were"):
        again = InvertibleCVAE.from_pretrained(tmp_path / "flow")
    again.save_pretrained(tmp_path / "flow")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InvertibleCVAE.from_pretrained(tmp_path / "flow")


def test_the_vae_by_a_path(tmp_path, monkeypatch):
    vae = make_model(max_len=12).eval()
    fitted(vae).save_pretrained(tmp_path / "f")
    again = InvertibleCVAE.from_pretrained(tmp_path / "f", vae=tmp_path / "f" / "vae")
    again.save_pretrained(tmp_path / "f")  # which would take the VAE away with what it replaces
    assert InvertibleCVAE.from_pretrained(tmp_path / "f").define(["cat"])
    vae.save_pretrained(tmp_path / "vae", include_frozen=True)
    monkeypatch.chdir(tmp_path)
    again = InvertibleCVAE.from_pretrained("f", vae="./vae")  # of where we are, not of the flow's folder
    again.save_pretrained("g")
    assert json.loads((tmp_path / "g" / "config.json").read_text())["vae"] == str(tmp_path / "vae")
    for bad in (3, {"vae": 1}, b"f/vae"):
        with pytest.raises(ConfigError, match=f"no VAE and no place of one.*{type(bad).__name__}"):
            InvertibleCVAE.from_pretrained("f", vae=bad)


@pytest.mark.parametrize("dim", [4, 6, 9])  # each kind of bridge
def test_an_edited_configuration_is_refused(tmp_path, dim):
    vae = make_model(max_len=12).eval()
    fitted(vae, dim).save_pretrained(tmp_path / "flow")
    config = tmp_path / "flow" / "config.json"
    values = json.loads(config.read_text())
    bridges = [
        {"kind": kind, "dim_in": width, "noise": noise}
        for kind, width, noise in (
            ("foo", dim, 0.1), ("auto", dim, 0.1), (None, dim, 0.1), (values["bridge"]["kind"], 99, 0.1),
            (values["bridge"]["kind"], 5, 0.1), ("none", "6", 0.1), ("pad", True, 0.1), ("pad", 0, 0.1),
            (values["bridge"]["kind"], dim, 0.0), (values["bridge"]["kind"], dim, "0.1"),
        )
    ]  # fmt: skip
    edits = [
        *({"bridge": bridge} for bridge in (*bridges, None, [], "pca", {})),
        *({"vectors": vectors} for vectors in ([], "glove", 3, {}, {"source": "glove"}, {"fingerprint": "0"},
                                               {"source": 3, "fingerprint": "0"}, {"source": "/etc/x", "fingerprint": "0"})),
        *({"clusters": clusters} for clusters in (None, ["n"], "n", 3)),
        *({"flow": flow} for flow in (None, [], "coupling", {"kind": "foo"})),
        *({"spec": spec} for spec in (None, [], {}, {**values["spec"], "dim": 1})),
        *({"vae_settings": settings} for settings in (None, [], "mean")),
        *({"vae": place} for place in (None, 3, "", [])),
    ]  # fmt: skip
    for edit in edits:
        given = None if "vae" in edit else vae
        config.write_text(json.dumps({**values, **edit}))
        with pytest.raises(CheckpointError):
            print(edit, InvertibleCVAE.from_pretrained(tmp_path / "flow", vae=given).bridge)
    for name in values.keys() - {"vectors"}:  # which may have been given at every use
        config.write_text(json.dumps({other: value for other, value in values.items() if other != name}))
        with pytest.raises(CheckpointError):
            print(name, InvertibleCVAE.from_pretrained(tmp_path / "flow", vae=None if name == "vae" else vae))
    config.write_text(json.dumps(values))
    assert InvertibleCVAE.from_pretrained(tmp_path / "flow").define(["cat"])


def test_the_fields_that_make_no_other_latents_exist():
    assert {field.name for field in dataclasses.fields(lf.LMVAEConfig)} >= NOT_OF_LATENTS
