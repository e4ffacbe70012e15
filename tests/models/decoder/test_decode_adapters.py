"""Decoding with a decoder that has low-rank adapters: over prepared weights that these are added to."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.kernels.backend import backend
from lmvae_fast.models.decoder.cache import LatentCache
from lmvae_fast.models.decoder.exchange import exchanged
from lmvae_fast.models.decoder.linear_weights import Unlike, linear_weight
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


def _in_place(weight):
    weight.mul_(2.0)


def _unseen(weight):
    weight.data.mul_(2.0)


def _by_a_fused_step(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
@pytest.mark.parametrize("change", [_in_place, _unseen, _by_a_fused_step])
def test_adapters_that_changed_are_added_anew(half, change):
    """However they are changed: a fused optimizer's step leaves no trace in a tensor's version."""
    require("packed_linear", "cpp")
    decoder = _tuned().decoder
    first = exchanges(decoder, 3)
    assert exchanges(decoder, 3) is first
    changed = next(w for name, w in decoder.body.named_parameters() if f".{half}." in name)
    with torch.no_grad():
        change(changed)
    expected = _step(decoder, 3)
    layers = exchanges(decoder, 3)
    assert layers is not first
    with exchanged(layers):
        torch.testing.assert_close(_step(decoder, 3), expected, rtol=1e-4, atol=1e-4)


def test_texts_after_a_run_are_those_of_what_was_learnt(tmp_path):
    require("packed_linear", "cpp")
    model = _tuned()
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    before = model.decode(z, max_new_tokens=6)
    config = lf.TrainConfig(
        output_dir=str(tmp_path), max_steps=3, batch_size=2, learning_rate=0.3, progress=False, tensorboard=False
    )
    lf.train(model, ["a cat sat", "dogs eat", "the sun is a star", "frogs jump"], None, config)
    model.eval()
    after = model.decode(z, max_new_tokens=6)
    with backend("reference"):
        assert model.decode(z, max_new_tokens=6) == after != before


def test_what_was_prepared_goes_when_training_begins_again():
    require("packed_linear", "cpp")
    model = _tuned()
    body = weakref.ref(exchanges(model.decoder, 3)[0][1])
    model.train()
    gc.collect()
    assert body() is None


def test_adapters_beside_half_weights_are_not_added():
    """A change of less than half of a weight's last digit would be gone."""
    require("packed_linear", "cpp")
    decoder = _tuned().decoder
    for name, weight in decoder.named_parameters():
        if ".lora_" not in name:
            weight.data = weight.data.to(torch.bfloat16)
    assert decoder.body not in [module for module, _ in exchanges(decoder, 3)]
    adapted = next(module for module in decoder.body.modules() if hasattr(module, "base_layer"))
    with pytest.raises(Unlike, match="bfloat16"):
        effective_weight(adapted)


def test_dropout_of_adapters_counts_while_it_drops():
    adapted = next(module for module in _tuned().decoder.body.modules() if hasattr(module, "base_layer"))
    adapted.lora_dropout["default"] = torch.nn.Dropout(0.5).eval()
    effective_weight(adapted)
    adapted.lora_dropout["default"].train()
    with pytest.raises(Unlike, match="plainly"):
        effective_weight(adapted)


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
