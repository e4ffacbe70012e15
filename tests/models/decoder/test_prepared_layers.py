"""Bodies written out over packed weights equal the modules they stand for, and are used for nothing else."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lmvae_fast.models.decoder import prepared_layers as bodies
from lmvae_fast.models.decoder import prepared_weights as packed
from lmvae_fast.models.decoder.attention import PackedAttention
from lmvae_fast.models.decoder.examination import in_float32
from lmvae_fast.models.decoder.exchange import exchanged
from lmvae_fast.models.decoder.large_pages import LargePages
from lmvae_fast.models.decoder.packed_products import Packing, rounded
from lmvae_fast.testing import make_decoder

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")


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
    ("family", "window"),
    [*((family, None) for family in FAMILIES), *((family, 3) for family in FAMILIES[2:5] + FAMILIES[6:])],
)
@torch.no_grad()
def test_a_body_equals_its_modules(family, window):
    _, decoder = make_decoder(family, window=window)
    for parameter in decoder.model.parameters():  # biases and norms that do something
        parameter.add_(0.1 * torch.randn_like(parameter))
    forward = bodies.body_forward(decoder, Packing())
    assert forward is not None
    given = _given(decoder)
    ours, theirs = (f(**given).last_hidden_state for f in (forward, decoder.body))
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_body_in_bf16_is_no_further_from_fp32_than_its_modules(family, weights):
    _, decoder = make_decoder(family)
    for parameter in decoder.model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    decoder.model.to(torch.bfloat16)
    forward = bodies.body_forward(decoder, Packing(weights))
    assert forward is not None
    given = _given(decoder)
    given["inputs_embeds"] = given["inputs_embeds"].bfloat16()
    ours = forward(**given).last_hidden_state
    assert ours.dtype == torch.bfloat16
    with exchanged(rounded(decoder.body, weights)):
        theirs = decoder.body(**given).last_hidden_state
        with in_float32(decoder.body):
            truth = decoder.body(**given | {"inputs_embeds": given["inputs_embeds"].float()}).last_hidden_state
    ours_off, theirs_off = ((side.float() - truth).norm() for side in (ours, theirs))
    assert ours_off <= 1.5 * theirs_off, (ours_off, theirs_off)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_body_with_int8_weights_equals_its_modules_with_those(family):
    _, decoder = make_decoder(family)
    forward, given = bodies.body_forward(decoder, Packing("int8")), _given(decoder)
    assert forward is not None
    ours, exact = (f(**given).last_hidden_state for f in (forward, decoder.body))
    with exchanged(rounded(decoder.body, "int8")):
        theirs = decoder.body(**given).last_hidden_state
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert 1e-4 * exact.norm() < (ours - exact).norm() < 0.05 * exact.norm()


def test_families_written_out_are_exchanged_whole_and_others_are_not():
    for family, whole in [("gpt2", True), ("llama", True), ("gemma2", True), ("gemma3", True), ("opt", False)]:
        _, decoder = make_decoder(family)
        with packed.packed_weights(decoder, 4):
            assert ("forward" in decoder.body.__dict__) == whole, family
        assert "forward" not in decoder.body.__dict__


def test_what_is_not_exactly_a_known_layer_keeps_its_modules(caplog):
    _, decoder = make_decoder("gpt2")
    decoder.body.h[1].mlp.act = nn.ReLU()
    with caplog.at_level(logging.INFO):
        assert bodies.body_forward(decoder, Packing()) is None
    assert "another activation" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(torch.float32, None), (torch.float32, "int8"), (torch.bfloat16, None), (torch.bfloat16, "int8")],
)
@torch.no_grad()
def test_a_body_that_computes_something_else_is_not_used(caplog, dtype, weights):
    _, decoder = make_decoder("llama")
    decoder.model.to(dtype)
    norm = decoder.body.layers[0].input_layernorm
    norm.forward = lambda x: 2 * nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    assert bodies.body_forward(decoder, Packing(weights)) is None
    assert "are off by" in caplog.text


def test_large_pages_hand_out_separate_tensors():
    pages = LargePages()
    shapes = [(3, 5), (1,), (9 << 20,), (2, 2, 2)]
    tensors = [pages.empty(*shape).fill_(number) for number, shape in enumerate(shapes)]
    for number, (shape, tensor) in enumerate(zip(shapes, tensors, strict=True)):
        assert tensor.shape == shape
        assert tensor.data_ptr() % 64 == 0
        assert (tensor == number).all()
    narrow = [pages.copy(torch.arange(n).to(dtype)) for n, dtype in ((5, torch.int8), (3, torch.bfloat16))]
    assert [t.tolist() for t in narrow] == [[0, 1, 2, 3, 4], [0, 1, 2]]
    assert [t.data_ptr() % 64 for t in narrow] == [0, 0]
