"""Prompts read in one parallel pass against the same prompts read token by token."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.models.decoder import prefill
from lmvae_fast.models.injection import Injection
from lmvae_fast.testing import make_decoder
from tests.models.test_parallel_pass import problem

PROMPTS = ([1, 9, 33, 50, 7], [], [1], [1, 60])  # for the four rows of `problem`: long, none, one token, two


def caches(decoder, visibility, dtype, residual=False):
    memory, shift, output, ids = problem(decoder, visibility, dtype)
    injection = Injection(visibility, memory, shift, output if residual else None).detach()
    made = [decoder.new_cache(injection, batch=4, max_tokens=8) for _ in range(2)]
    for cache in made:
        cache.place(torch.arange(4), injection)
    return injection, *made, ids[:, :2]


@torch.no_grad()
def read_by_steps(decoder, cache, injection, prompts):
    """Each row alone, so that rows of other lengths are not read on."""
    for row, prompt in enumerate(prompts):
        kept, step = cache.kv.clone(), cache.step.clone()
        for token in prompt:
            decoder.step(torch.full((4,), token), cache, injection)
        kept[:, :, row], step[row] = cache.kv[:, :, row], cache.step[row]
        cache.kv.copy_(kept), cache.step.copy_(step)


@pytest.mark.parametrize("visibility", ["prefix", "rolling", "interleaved"])
@pytest.mark.parametrize(
    ("family", "window"),
    [("gpt2", None), ("llama", None), ("gemma2", 4), ("gemma3", None), ("mistral", 4), ("qwen2", None), ("opt", None)],
)
def test_steps_go_on_as_after_steps(monkeypatch, family, window, visibility):
    if visibility == "rolling":
        window = None  # refused with a window
    _, decoder = make_decoder(family, dtype=torch.float64, window=window)
    injection, ours, expected, following = caches(decoder, visibility, torch.float64, residual=True)
    read_by_steps(decoder, expected, injection, PROMPTS)
    monkeypatch.setattr(prefill, "_TOKENS", 5)  # so that it takes two passes
    with torch.no_grad():
        prefill.read(decoder, ours, injection, range(4), PROMPTS)
        assert torch.equal(ours.step, expected.step)
        for token in following.T:  # two, so that a token left in the wrong place is read
            got, want = (decoder.step(token, cache, injection) for cache in (ours, expected))
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.kv, expected.kv, rtol=1e-11, atol=1e-11)


def test_rows_anywhere_and_memory_of_the_cache_itself():
    _, decoder = make_decoder("llama", dtype=torch.float64)
    injection, ours, expected, _ = caches(decoder, "rolling", torch.float64)
    read_by_steps(decoder, expected, injection, PROMPTS)
    own = Injection("rolling", ours.memory, injection.embedding_shift)
    with torch.no_grad():
        prefill.read(decoder, ours, own, range(4), PROMPTS)
    torch.testing.assert_close(ours.kv, expected.kv, rtol=1e-11, atol=1e-11)
    order = torch.tensor([2, 0, 3, 1])
    scattered = decoder.new_cache(injection, batch=4, max_tokens=8)
    scattered.place(order, injection)
    with torch.no_grad():
        prefill.read(decoder, scattered, injection, order.tolist(), PROMPTS)
    torch.testing.assert_close(scattered.kv[:, :, order], expected.kv, rtol=1e-11, atol=1e-11)
    assert torch.equal(scattered.step[order], expected.step)
