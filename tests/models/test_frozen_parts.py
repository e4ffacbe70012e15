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
    with pytest.raises(ConfigError, match="decoder has other weights.*would be lost.*include_frozen unset"):
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
