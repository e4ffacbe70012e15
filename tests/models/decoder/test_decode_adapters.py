"""Decoding with a decoder that has low-rank adapters: over prepared weights that these are added to."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.backend import backend
from lmvae_fast.models.decoder.cache import LatentCache
from lmvae_fast.models.decoder.exchange import exchanged
from lmvae_fast.models.decoder.linear_weights import linear_weight
from lmvae_fast.models.decoder.low_rank import effective_weight
from lmvae_fast.models.decoder.prepared_weights import exchanges, pays
from lmvae_fast.models.injection import Injection
from lmvae_fast.testing import make_model
from tests.kernels.common import require

FAMILIES = ("gpt2", "llama", "qwen3", "gemma2")


def _tuned(family="llama", **options):
    """A model of our own system in evaluation mode, whose adapters do something."""
    pytest.importorskip("peft")
    model = make_model(family, system="lmvae", lora_rank=2, **options).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.decoder.body.named_parameters():
            if ".lora_B." in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


@torch.no_grad()
def _step(decoder, rows):
    cache = LatentCache(
        layers=decoder.num_layers, kv_heads=decoder.kv_heads, head_dim=decoder.head_dim, batch=rows, slots=2, max_tokens=5,
        visibility="prefix", dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    cache.memory.copy_(torch.randn(cache.memory.shape, generator=torch.Generator().manual_seed(0)))
    return decoder.step(torch.arange(rows) % 7, cache, Injection("prefix", cache.memory))


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("name", ["cpp", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_over_them_is_the_modules(family, name, rows):
    require("packed_linear" if name == "cpp" else "frozen_layer", name)
    if name == "triton" and (rows > 16 or family not in ("gpt2", "llama")):
        pytest.skip("the layers that training has, which have tests of their own, in the interpreter")
    decoder = _tuned(family).decoder
    expected = _step(decoder, rows)
    assert not torch.allclose(expected, _step(make_model(family).decoder, rows), atol=1e-3)
    with backend("auto" if name == "cpp" else name):
        layers = exchanges(decoder, rows)
        assert decoder.body in [module for module, _ in layers]
        with exchanged(layers):
            torch.testing.assert_close(_step(decoder, rows), expected, rtol=1e-4, atol=1e-4)


def test_texts_are_those_of_the_modules():
    require("packed_linear", "cpp")
    model = _tuned()
    z = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    assert pays(model.decoder, 9)
    prepared = model.decode(z, max_new_tokens=6)
    assert any(prepared)
    with backend("reference"):
        assert model.decode(z, max_new_tokens=6) == prepared


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_adapters_that_changed_are_added_anew(half):
    """In place, as an optimizer does it; also while the weights beside them are in another dtype."""
    require("packed_linear", "cpp")
    for dtype in (torch.float32, torch.bfloat16):
        decoder = _tuned().decoder
        for name, weight in decoder.named_parameters():
            if ".lora_" not in name:
                weight.data = weight.data.to(dtype)
        first = exchanges(decoder, 3)
        assert exchanges(decoder, 3) is first
        with torch.no_grad():
            next(w for name, w in decoder.body.named_parameters() if f".{half}." in name).mul_(2.0)
        assert exchanges(decoder, 3) is not first


def test_a_decoder_that_is_being_trained_keeps_its_modules():
    require("packed_linear", "cpp")
    model = _tuned()
    model.train()
    assert not pays(model.decoder, 3)
    assert not pays(make_model("llama", train_decoder=True).eval().decoder, 3)  # all of it trains
    model.eval()
    assert pays(model.decoder, 3)


def test_a_weight_with_its_adapter():
    for family in ("gpt2", "llama"):
        body = _tuned(family).decoder.body
        adapted = next(
            module for module in body.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")
        )
        x = torch.randn(4, adapted.in_features)
        bias = adapted.base_layer.bias
        found = x @ effective_weight(adapted).t() + (0.0 if bias is None else bias)
        torch.testing.assert_close(found, adapted(x))
        before = linear_weight(adapted.base_layer).clone()
        effective_weight(adapted)
        assert torch.equal(linear_weight(adapted.base_layer), before)


def test_adapters_that_are_switched_off_are_not_added():
    require("packed_linear", "cpp")
    decoder = _tuned().decoder
    with_them = _step(decoder, 3)
    for module in decoder.body.modules():
        if hasattr(module, "enable_adapters") and hasattr(module, "base_layer"):
            module.enable_adapters(False)
    plain = _step(decoder, 3)
    assert not torch.allclose(plain, with_them, atol=1e-3)
    with exchanged(exchanges(decoder, 3)):
        torch.testing.assert_close(_step(decoder, 3), plain, rtol=1e-4, atol=1e-4)
