"""On any machine: a training pass reads nothing on the host and mixes no devices. Meta tensors refuse both."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.models.tiny import make_model

TEXTS = ["a cat is a kind of animal", "dogs eat meat"]


@pytest.mark.parametrize("options", [
    {}, {"visibility": "prefix", "slots": 4, "embedding_shift": True}, {"visibility": "interleaved"},
    {"system": "optimus", "train_encoder": False}, {"objective": "langvae-0.6", "free_running": True},
])  # fmt: skip
def test_training_pass_on_meta_tensors(options, monkeypatch):
    # torch has no autocast for the meta device; none is wanted here
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *a: False)
    model = make_model("gpt2", max_len=12, **options).train()
    sentences = model.tokenize(TEXTS)
    batch = model.make_batch(sentences, pooled=model.pool(sentences)).to("meta")
    model = model.to("meta")
    model.free_running.rest = 1  # the loop over tokens: fixed-point iteration has to look at what it has fixed
    out = model(batch, beta=1.0, seed=3)
    out.loss.backward()
    assert out.loss.device.type == "meta"
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_value_read_on_the_host_is_found():
    """The check above can fail."""
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(3, device="meta").sum().item()
