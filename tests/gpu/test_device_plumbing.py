"""On any machine: training passes and decode steps read nothing on the host and mix no devices. Meta tensors refuse both."""

from __future__ import annotations

import contextlib

import pytest
import torch

from lmvae_fast.config import GenerationConfig
from lmvae_fast.generation.decode_rows import Rows, Start
from lmvae_fast.testing import make_model

TEXTS = ["a cat is a kind of animal", "dogs eat meat"]


@pytest.fixture
def no_autocast(monkeypatch):
    """torch has none for the meta device, and none is wanted here."""
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *a: False)


@pytest.mark.parametrize("options", [
    {}, {"visibility": "prefix", "slots": 4, "embedding_shift": True}, {"visibility": "interleaved"},
    {"system": "optimus", "train_encoder": False}, {"objective": "langvae-0.6", "free_running": True},
])  # fmt: skip
def test_training_pass_on_meta_tensors(options, no_autocast):
    model = make_model("gpt2", max_len=12, **options).train()
    sentences = model.tokenize(TEXTS)
    batch = model.make_batch(sentences, pooled=model.pool(sentences)).to("meta")
    model = model.to("meta")
    model.free_running.rest = 1  # the loop over tokens: fixed-point iteration has to look at what it has fixed
    out = model(batch, beta=1.0, seed=3)
    out.loss.backward()
    assert out.loss.device.type == "meta"
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [
    {}, {"visibility": "prefix", "slots": 4, "embedding_shift": True}, {"visibility": "interleaved", "family": "llama"},
    {"system": "optimus"},
])  # fmt: skip
def test_prompts_and_decode_steps_on_meta_tensors(options, no_autocast):
    model = make_model(**{"family": "gpt2", "max_len": 12, **options}).eval().to("meta")
    config = GenerationConfig(do_sample=True, top_p=0.9, seed=1, repetition_penalty=1.2, logprobs=True)
    with torch.no_grad():
        kind = model.inject(torch.zeros(0, 6, device="meta"))
        rows = Rows(model, kind, 4, limit=5, longest_prompt=3, config=config, seed=1)
        latents = torch.zeros(2, 6, device="meta")
        injection = model.inject(latents, out=rows.room(1, 2))
        rows.start([1, 2], injection, [Start(0, 0, 0, (5, 6, 7)), Start(1, 0, 1, ())], placed=True)
        rows.start([3], model.inject(latents[:1]), [Start(2, 0, 2)])
        rows.advance()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        rows.ended()


def test_a_value_read_on_the_host_is_found():
    """The check above can fail."""
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(3, device="meta").sum().item()
