"""Latents that wait: regrouped into blocks of one size, and projected straight into the cache where a whole block starts."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import LatentError
from lmvae_fast.generation import engine
from lmvae_fast.generation.decode_rows import Rows
from lmvae_fast.generation.engine import generate
from lmvae_fast.generation.queue import blocks_of
from lmvae_fast.testing import make_model
from tests.generation.test_engine import end_with_a_common_token


@pytest.mark.parametrize("sizes", [[1] * 11, [3, 0, 5, 3], [11], [10, 1], [4, 7]])
def test_blocks_of_any_size_become_blocks_of_one_size(sizes):
    model = make_model("gpt2")
    z = torch.randn(11, 6)
    blocks = [block for block, _ in blocks_of(model, iter(z.split(sizes)), None, 4)]
    assert [len(block) for block in blocks] == [4, 4, 3]
    assert torch.equal(torch.cat(blocks), z)
    assert [len(block) for block, _ in blocks_of(model, z, None, 4)] == [4, 4, 3]


def test_no_more_is_read_than_the_next_block_takes():
    model = make_model("gpt2")
    read = []

    def latents():
        for row in range(9):
            read.append(row)
            yield torch.randn(1, 6)
        yield torch.full((1, 6), float("nan"))

    blocks = blocks_of(model, latents(), None, 4)
    assert not read
    next(blocks)
    assert len(read) == 4
    next(blocks)
    with pytest.raises(LatentError, match="row 0"):
        next(blocks)


def test_single_latents_fill_a_batch(monkeypatch):
    model = make_model("gpt2").eval()
    z = 2 * torch.randn(19, 6)
    end_with_a_common_token(model, z)
    expected = list(generate(model, z))
    sizes = []

    class Seen(Rows):
        def __init__(self, model, kind, size, **options):
            sizes.append(size)
            super().__init__(model, kind, size, **options)

    monkeypatch.setattr(engine, "Rows", Seen)
    assert list(generate(model, iter(z.split(1)), GenerationConfig(batch_size=8))) == expected
    assert sizes == [8]


@pytest.mark.parametrize("system", [
    {}, {"visibility": "prefix", "slots": 4, "embedding_shift": True}, {"visibility": "interleaved"},
    {"system": "optimus"}, {"projector": "mlp", "projector_hidden": 7},
])  # fmt: skip
def test_whole_blocks_are_projected_into_the_cache(monkeypatch, system):
    """And what stands in the cache is, bit by bit, what a tensor of its own would hold."""
    model = make_model("gpt2", **system).eval()
    z = 2 * torch.randn(10, 6)
    model.decoder.tokenizer.eos_token_id = -1  # all sentences end together
    straight, inside = [], []
    project, start = model.projector.forward, Rows.start

    def spy(latents, **options):
        if len(latents):
            straight.append((len(latents), options["out"] is not None))
        return project(latents, **options)

    def started(self, rows, injection, starts, **options):
        start(self, rows, injection, starts, **options)
        inside.append(self.cache.memory[:, :, rows].clone())

    monkeypatch.setattr(model.projector, "forward", spy)
    monkeypatch.setattr(Rows, "start", started)
    tokens = 5
    outs = list(generate(model, z, GenerationConfig(batch_size=4, max_new_tokens=tokens)))
    assert len(outs) == 10 and straight == [(4, True), (4, True), (2, True)]
    with torch.no_grad():
        expected = [model.inject(part, tokens=tokens).memory for part in z.split(4)]
    assert torch.equal(torch.cat(inside, dim=2), torch.cat(expected, dim=2))


def test_a_refill_of_some_rows_takes_from_a_projected_block(monkeypatch):
    model = make_model("gpt2").eval()
    z = 2 * torch.randn(30, 6)
    end_with_a_common_token(model, z)
    sizes = []
    project = model.projector.forward
    monkeypatch.setattr(model.projector, "forward", lambda z, **options: sizes.append(len(z)) or project(z, **options))
    list(generate(model, z, GenerationConfig(batch_size=6)))
    assert [size for size in sizes if size] == [6] * 5  # every latent once, a whole block at a time
