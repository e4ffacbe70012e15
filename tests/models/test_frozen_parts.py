"""Parts that a model's folder names and does not hold: stored when they became others, refused when others stand there now;
and stages of training that follow one another."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lmvae_fast as lf
from lmvae_fast.errors import CheckpointError, ConfigError
from lmvae_fast.testing import SENTENCES, tiny_decoder, tiny_encoder, tiny_tokenizer

Z = 3 * torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def write_parts(encoder, decoder, family="gpt2"):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tiny_encoder("bert", vocab_size=len(tokenizer)).save_pretrained(encoder)
    tiny_decoder(family, vocab_size=len(tokenizer)).save_pretrained(decoder)
    for folder in (encoder, decoder):
        tokenizer.save_pretrained(folder)


@pytest.fixture(params=["folder", "hub"])
def names(request, tmp_path, monkeypatch):
    """Encoder and decoder as folders, and as names in a Hugging Face cache."""
    if request.param == "folder":
        write_parts(tmp_path / "encoder", tmp_path / "decoder")
        return str(tmp_path / "encoder"), str(tmp_path / "decoder")
    places = {name: tmp_path / "hub" / f"models--me--{name}" for name in ("encoder", "decoder")}
    write_parts(*(place / "snapshots" / ("a" * 40) for place in places.values()))
    for place in places.values():
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return "me/encoder", "me/decoder"


def build(names, **options):
    torch.manual_seed(0)
    encoder, decoder = names
    return lf.LMVAE(lf.LMVAEConfig(encoder=encoder, decoder=decoder, latent_dim=6, max_len=9, **options)).eval()


def moved(model):
    """The model, with everything that trains a step further."""
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn_like(value))
    return model


def loss(model):
    with torch.no_grad():
        return model(SENTENCES[:3], eps=torch.zeros(3, 6)).loss


def test_a_decoder_of_an_earlier_stage_is_saved_with_the_model_that_it_is_frozen_in(names, tmp_path):
    first = moved(build(names, train_decoder=True))
    first.save_pretrained(tmp_path / "1", include_frozen=False)
    second = lf.LMVAE.from_pretrained(tmp_path / "1", train_decoder=False)
    assert second.decode(Z) == first.decode(Z) != build(names).decode(Z)
    with pytest.raises(ConfigError, match=r"decoder has other weights.*would be lost.*include_frozen unset"):
        second.save_pretrained(tmp_path / "2", include_frozen=False)
    assert not (tmp_path / "2").exists()
    second.save_pretrained(tmp_path / "2")
    again = lf.LMVAE.from_pretrained(tmp_path / "2")
    assert again.decode(Z) == first.decode(Z)
    torch.testing.assert_close(loss(again), loss(first))


def test_a_frozen_part_that_was_changed_by_hand_is_saved_with_the_model(names, tmp_path):
    model = build(names)
    with torch.no_grad():
        model.encoder.model.embeddings.word_embeddings.weight.mul_(2)
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(
        lf.LMVAE.from_pretrained(tmp_path / "m").encode(SENTENCES[:2]).mu, model.encode(SENTENCES[:2]).mu
    )
    assert (tmp_path / "m" / "encoder").is_dir()


# ---- another part in the named one's place ---------------------------------------------------------------------------


def edited_config(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "activation_function": "relu", "hidden_act": "relu"}))


def permuted_vocabulary(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    others = [token for token, place in vocabulary.items() if place > 20]
    places = [vocabulary[token] for token in others]
    vocabulary |= dict(zip(others, reversed(places), strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(values))


def other_weights(folder):
    file = folder / "model.safetensors"
    save_file(
        {key: value + 0.1 * torch.randn_like(value) for key, value in load_file(file).items()}, file, {"format": "pt"}
    )


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize(
    ("change", "what", "options"),
    [
        (edited_config, "another configuration.*relu", {}),
        (permuted_vocabulary, "another tokenizer", {}),
        (other_weights, "other weights", {}),
        (other_weights, "other weights", {"dtype": "bfloat16"}),
    ],
)
def test_another_frozen_part_is_refused(tmp_path, part, change, what, options, caplog):
    write_parts(tmp_path / "encoder", tmp_path / "decoder")
    build((str(tmp_path / "encoder"), str(tmp_path / "decoder"))).save_pretrained(tmp_path / "m", include_frozen=False)
    lf.LMVAE.from_pretrained(tmp_path / "m", **options)
    change(tmp_path / part)
    with pytest.raises(CheckpointError, match=f"the {part} has {what}"):
        lf.LMVAE.from_pretrained(tmp_path / "m", **options)
    shutil.copytree(tmp_path / part, tmp_path / "other")
    write_parts(tmp_path / "encoder", tmp_path / "decoder")
    lf.LMVAE.from_pretrained(tmp_path / "m", **{part: str(tmp_path / "other")}, **options)  # on purpose: a warning
    assert f"the {part} given has" in caplog.text


def test_models_without_these_records_are_loaded(tmp_path):
    write_parts(tmp_path / "encoder", tmp_path / "decoder")
    model = build((str(tmp_path / "encoder"), str(tmp_path / "decoder")))
    model.save_pretrained(tmp_path / "m", include_frozen=False)
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    values["frozen_sha256"] = {
        part: {key: entry[key] for key in ("dtype", "sha256")} for part, entry in values["frozen_sha256"].items()
    }
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    assert lf.LMVAE.from_pretrained(tmp_path / "m").decode(Z) == model.decode(Z)
    lf.LMVAE.from_pretrained(tmp_path / "m", dtype="bfloat16")


def test_a_model_in_half_precision_that_trained_is_frozen_again(tmp_path):
    """What trains in part is held in float32, and in half precision when it is frozen: the same part both times."""
    pytest.importorskip("peft")
    write_parts(tmp_path / "encoder", tmp_path / "decoder")
    names = (str(tmp_path / "encoder"), str(tmp_path / "decoder"))
    build(names, decoder_part="lora", dtype="bfloat16").save_pretrained(tmp_path / "m", include_frozen=False)
    assert lf.LMVAE.from_pretrained(tmp_path / "m", train_decoder=False).decoder.dtype == torch.bfloat16


# ---- stages ----------------------------------------------------------------------------------------------------------

FROZEN, ALL, EMBEDDINGS, LORA, WIDER = (
    {"train_decoder": False},
    {"decoder_part": "all"},
    {"decoder_part": "embeddings"},
    {"decoder_part": "lora"},
    {"decoder_part": "lora", "lora_rank": 5, "lora_alpha": 3.0},
)
STAGES = [
    ("gpt2", FROZEN, LORA), ("gpt2", FROZEN, ALL), ("gpt2", ALL, LORA), ("gpt2", LORA, FROZEN), ("gpt2", LORA, WIDER),
    ("llama", ALL, FROZEN), ("llama", EMBEDDINGS, LORA), ("llama", LORA, ALL), ("llama", LORA, EMBEDDINGS),
    ("llama", LORA, LORA),
]  # fmt: skip


@pytest.mark.parametrize(("family", "first", "second"), STAGES, ids=str)  # weights that are kept transposed, and not
def test_every_stage_begins_with_what_the_one_before_ended_with(tmp_path, family, first, second):
    pytest.importorskip("peft")
    write_parts(tmp_path / "encoder", tmp_path / "decoder", family)
    names = (str(tmp_path / "encoder"), str(tmp_path / "decoder"))
    model = moved(build(names, **{"train_decoder": True, **first}))
    model.save_pretrained(tmp_path / "1", include_frozen=False)
    later = lf.LMVAE.from_pretrained(tmp_path / "1", **second)
    assert later.config.train_decoder is (second is not FROZEN)
    torch.testing.assert_close(loss(later), loss(model), rtol=1e-5, atol=0)
    assert later.decode(Z) == model.decode(Z)
    moved(later).save_pretrained(tmp_path / "2")
    torch.testing.assert_close(loss(lf.LMVAE.from_pretrained(tmp_path / "2")), loss(later), rtol=1e-5, atol=0)


def test_adapters_that_fit_no_weight_are_refused(tmp_path):
    pytest.importorskip("peft")
    write_parts(tmp_path / "encoder", tmp_path / "decoder")
    build((str(tmp_path / "encoder"), str(tmp_path / "decoder")), decoder_part="lora").save_pretrained(tmp_path / "m")
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    del values["weights_sha256"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    state = load_file(tmp_path / "m" / "model.safetensors")
    name = next(name for name in sorted(state) if ".lora_B." in name)
    less = {key: value for key, value in state.items() if key != name}
    for damaged in (less, {**state, name: state[name][:-1].clone()}):
        save_file(damaged, tmp_path / "m" / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"adapter.*remedy"):
            lf.LMVAE.from_pretrained(tmp_path / "m", train_decoder=False)
