"""Encoders take flash-attn's attention on CUDA in half precision, here with a stand-in for the device and the package."""

from __future__ import annotations

import copy

import pytest
import torch

from lmvae_fast.models import encoder_attention
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.testing import tiny_encoder, tiny_tokenizer


@pytest.fixture
def changes(monkeypatch):
    """The attentions that models are given, in order; flash-attn is installed and every weight is on CUDA."""
    found = []

    def change(self, name):
        found.append(name)
        self.config._attn_implementation = "sdpa"  # what computes here, whatever was asked for

    monkeypatch.setattr(encoder_attention, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(encoder_attention, "_on_cuda", lambda weight: True)
    monkeypatch.setattr("transformers.PreTrainedModel.set_attn_implementation", change)
    return found


def encoder(family="bert", dtype=torch.bfloat16):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return Encoder(tiny_encoder(family, vocab_size=len(tokenizer)).to(dtype), tokenizer)


def read(model):
    return model.pool_texts(["a cat sat", "dogs eat"], [3, 2])


def test_in_half_precision_it_is_taken_once_and_given_back(changes, monkeypatch):
    model = encoder()
    expected = read(model)
    read(model)
    assert changes == ["flash_attention_2"]
    monkeypatch.setattr(encoder_attention, "_on_cuda", lambda weight: False)  # moved to a CPU
    torch.testing.assert_close(read(model), expected)
    read(model)
    assert changes == ["flash_attention_2", "sdpa"]


def test_not_in_single_precision_and_not_by_models_without_it(changes):
    read(encoder(dtype=torch.float32))
    read(encoder("t5"))  # relative positions are added to its scores
    assert changes == []


def test_not_on_a_cpu_and_not_without_the_package(changes, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(encoder_attention, "_on_cuda", lambda weight: False)
        read(encoder())
    monkeypatch.setattr(encoder_attention, "is_flash_attn_2_available", lambda: False)
    read(encoder())
    assert changes == []


def test_a_model_that_cannot_call_it_keeps_its_own(changes, monkeypatch, caplog):
    def refuse(self, name):
        changes.append(name)
        raise ValueError("another version is needed")

    monkeypatch.setattr("transformers.PreTrainedModel.set_attn_implementation", refuse)
    with caplog.at_level("INFO", logger="lmvae_fast"):
        model = encoder()
        read(model)
        read(model)
    assert changes == ["flash_attention_2"]  # tried once
    assert "another version" in caplog.text


def test_a_copy_gets_its_usual_attention_back(changes, monkeypatch):
    copied = copy.deepcopy(encoder())
    monkeypatch.setattr(encoder_attention, "_on_cuda", lambda weight: False)
    read(copied)
    assert changes == ["flash_attention_2", "sdpa"]
