"""Bodies written out over packed weights equal the modules they stand for, and are used for nothing else."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lmvae_fast.models.decoder import prepared_layers as bodies
from lmvae_fast.models.decoder import prepared_weights as packed
from lmvae_fast.models.decoder.attention import PackedAttention
from lmvae_fast.models.decoder.large_pages import LargePages
from lmvae_fast.testing import make_decoder

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def _extension():
    _, decoder = make_decoder("gpt2")
    if not packed.pays(decoder, 4):
        pytest.skip("weights are not packed here")


def _given(decoder, tokens=9):
    embedded = torch.randn(1, tokens, decoder.hidden_size)
    offsets = torch.tensor([0, 4, tokens], dtype=torch.int32)
    memory = torch.randn(decoder.num_layers, 2, 2, decoder.kv_heads, 3, decoder.head_dim)
    positions = torch.tensor([[3, 4, 5, 6, *range(3, tokens - 1)]])
    attention = PackedAttention(memory, "prefix", offsets, tokens - 4)
    return {"inputs_embeds": embedded, "position_ids": positions, "use_cache": False, "lmvae": attention}


@pytest.mark.parametrize(
    ("family", "window"), [*((family, None) for family in FAMILIES), *((family, 3) for family in FAMILIES[2:])]
)
@torch.no_grad()
def test_a_body_equals_its_modules(family, window):
    _, decoder = make_decoder(family, window=window)
    for parameter in decoder.model.parameters():  # biases and norms that do something
        parameter.add_(0.1 * torch.randn_like(parameter))
    forward = bodies.body_forward(decoder, LargePages())
    assert forward is not None
    given = _given(decoder)
    ours, theirs = (f(**given).last_hidden_state for f in (forward, decoder.body))
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_families_written_out_are_exchanged_whole_and_others_are_not():
    for family, whole in [("gpt2", True), ("llama", True), ("gemma2", False), ("opt", False)]:
        _, decoder = make_decoder(family)
        with packed.packed_weights(decoder, 4):
            assert ("forward" in decoder.body.__dict__) == whole, family
        assert "forward" not in decoder.body.__dict__


def test_what_is_not_exactly_a_known_layer_keeps_its_modules(caplog):
    _, decoder = make_decoder("gpt2")
    decoder.body.h[1].mlp.act = nn.ReLU()
    with caplog.at_level(logging.INFO):
        assert bodies.body_forward(decoder, LargePages()) is None
    assert "another activation" in caplog.text


@torch.no_grad()
def test_a_body_that_computes_something_else_is_not_used(caplog):
    _, decoder = make_decoder("llama")
    norm = decoder.body.layers[0].input_layernorm
    norm.forward = lambda x: 2 * nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    assert bodies.body_forward(decoder, LargePages()) is None
    assert "are off by" in caplog.text


def test_large_pages_hand_out_separate_tensors():
    pages = LargePages()
    shapes = [(3, 5), (1,), (9 << 20,), (2, 2, 2)]
    tensors = [pages.empty(*shape).fill_(number) for number, shape in enumerate(shapes)]
    for number, (shape, tensor) in enumerate(zip(shapes, tensors, strict=True)):
        assert tensor.shape == shape
        assert tensor.data_ptr() % 64 == 0
        assert (tensor == number).all()
