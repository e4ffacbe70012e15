"""A decoding step's layers in one call: the same values and the same cache as the layers one by one, and only where it may."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lmvae_fast as lf
from lmvae_fast.models.decoder import decode_body
from lmvae_fast.models.decoder import prepared_layers as bodies
from lmvae_fast.models.decoder import prepared_weights as packed
from lmvae_fast.models.decoder.cache import LatentCache
from lmvae_fast.models.decoder.decode_body import DecodeBody, RowNorm
from lmvae_fast.models.decoder.packed_products import Packing
from lmvae_fast.testing import make_decoder

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
ROWS, TOKENS, SLOTS = 3, 4, 5


@pytest.fixture(autouse=True)
def _extension():
    _, decoder = make_decoder("gpt2")
    if not packed.pays(decoder, 4) or decode_body._kind() is None:
        pytest.skip("the C++ extension is not there")


def _decoder(family, dtype=torch.float32, window=None):
    _, decoder = make_decoder(family, window=window)
    for parameter in decoder.model.parameters():  # biases and norms that do something
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    decoder.model.to(dtype)
    return decoder


def _cache(decoder, visibility="prefix"):
    cache = LatentCache(
        layers=decoder.num_layers, kv_heads=decoder.kv_heads, head_dim=decoder.head_dim, batch=ROWS, slots=SLOTS,
        max_tokens=TOKENS, visibility=visibility, dtype=decoder.dtype, device=decoder.device,
    )  # fmt: skip
    cache.memory.copy_(torch.randn(cache.memory.shape, generator=torch.Generator().manual_seed(0)))
    return cache


def _steps(forward, decoder, visibility="prefix"):
    """Hidden states of every step, and the cache behind the last one; row 1 begins a step later than the others."""
    cache, generator = _cache(decoder, visibility), torch.Generator().manual_seed(1)
    states = []
    for step in range(TOKENS):
        if step == 1:
            cache.restart(torch.tensor([1]))
        cache.prepare()
        rows = torch.randn(1, ROWS, decoder.hidden_size, generator=generator).to(decoder.dtype)
        given = {"inputs_embeds": rows, "position_ids": cache.position_ids().unsqueeze(0), "lmvae": cache}
        states.append(forward(**given).last_hidden_state.float())
        cache.advance()
    return torch.cat(states), cache.kv.float()


def _both(monkeypatch, forward, decoder, visibility="prefix"):
    calls = []
    step = DecodeBody.step
    with monkeypatch.context() as patch:
        patch.setattr(DecodeBody, "step", lambda *given: calls.append(1) or step(*given))
        ours = _steps(forward, decoder, visibility)
    assert len(calls) == TOKENS  # what is compared is what it says
    with monkeypatch.context() as patch:
        patch.setattr(DecodeBody, "takes", lambda *given: False)
        return ours, _steps(forward, decoder, visibility)


@pytest.mark.parametrize("visibility", ["prefix", "rolling", "interleaved"])
@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_step_in_one_call_is_that_of_the_layers_one_by_one(monkeypatch, family, weights, visibility):
    decoder = _decoder(family)
    forward = bodies.body_forward(decoder, Packing(weights))
    assert forward is not None
    ours, theirs = _both(monkeypatch, forward, decoder, visibility)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
@torch.no_grad()
def test_a_window_ends_what_a_step_sees(monkeypatch, family):
    decoder, wide = (_decoder(family, window=window) for window in (3, None))
    wide.model.load_state_dict(decoder.model.state_dict())
    forward, unbounded = (bodies.body_forward(each, Packing()) for each in (decoder, wide))
    assert forward is not None and unbounded is not None
    (ours, _), (theirs, _) = _both(monkeypatch, forward, decoder)
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    assert (_steps(unbounded, wide)[0] - ours).norm() > 1e-3 * ours.norm()


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_step_in_bf16_is_no_further_from_fp32_than_the_layers_one_by_one(monkeypatch, family, weights):
    decoder = _decoder(family, torch.bfloat16)
    forward = bodies.body_forward(decoder, Packing(weights))
    assert forward is not None
    (ours, _), (theirs, _) = _both(monkeypatch, forward, decoder)
    decoder.model.float()
    packing = Packing(weights)
    exact = bodies.body_forward(decoder, packing)
    assert exact is not None
    truth, _ = _steps(exact, decoder)
    assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm() + 1e-3 * truth.norm()


@torch.no_grad()
def test_what_a_step_in_one_call_cannot_take_goes_through_the_layers(monkeypatch):
    decoder = _decoder("llama")
    forward = bodies.body_forward(decoder, Packing())
    assert forward is not None
    expected, _ = _steps(forward, decoder)
    monkeypatch.setattr(DecodeBody, "step", lambda *given: pytest.fail("was called"))
    with lf.backend("reference"):
        states, _ = _steps(forward, decoder)
    assert (states - expected).norm() <= 1e-5 * expected.norm()
    cache = _cache(decoder)
    cache.prepare()
    given = {"position_ids": cache.position_ids().unsqueeze(0), "lmvae": cache}
    rows = torch.randn(1, ROWS, decoder.hidden_size, requires_grad=True)
    monkeypatch.undo()
    with torch.enable_grad(), pytest.raises(ValueError, match="has no gradient"):
        forward(inputs_embeds=rows, **given)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode"):
        forward(inputs_embeds=forward_ad.make_dual(rows.detach(), torch.ones_like(rows)), **given)


@torch.no_grad()
def test_who_watches_operations_sees_those_of_every_layer():
    decoder = _decoder("gpt2")
    forward = bodies.body_forward(decoder, Packing())
    expected, _ = _steps(forward, decoder)
    with FlopCounterMode(display=False), Names() as seen:
        states, _ = _steps(forward, decoder)
    assert seen.names.count("lmvae_fast::latent_attention_step") == TOKENS * decoder.num_layers
    assert (states - expected).norm() <= 1e-6 * expected.norm()


class Names(TorchDispatchMode):
    """Names of the operations that come by."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_an_extension_without_it_leaves_the_layers_one_by_one(monkeypatch):
    decoder = _decoder("gpt2")
    expected, _ = _steps(bodies.body_forward(decoder, Packing()), decoder)
    monkeypatch.setattr(decode_body, "_kind", lambda: None)
    without = bodies.body_forward(decoder, Packing())
    assert without is not None
    states, _ = _steps(without, decoder)
    assert (states - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("factor", [1.01, float("nan")])
@torch.no_grad()
def test_a_step_that_computes_something_else_is_not_used(caplog, monkeypatch, factor):
    decoder, step = _decoder("llama"), DecodeBody.step
    monkeypatch.setattr(DecodeBody, "step", lambda *given: factor * step(*given))
    assert bodies.body_forward(decoder, Packing()) is None
    assert "are off by" in caplog.text


@torch.no_grad()
def test_a_cache_of_another_model_is_refused():
    decoder = _decoder("llama")
    norm = RowNorm(torch.ones(decoder.hidden_size), None, 1e-5, True)
    cache, x = _cache(decoder), torch.randn(ROWS, decoder.hidden_size)
    cache.prepare()
    with pytest.raises(RuntimeError, match="for 0 layers and 3 rows"):
        DecodeBody([], norm).step(x, cache, ())
    forward = bodies.body_forward(decoder, Packing())
    given = {"inputs_embeds": x.unsqueeze(0), "position_ids": cache.position_ids().unsqueeze(0)}
    for heads, dim in ((2 * decoder.kv_heads, decoder.head_dim), (decoder.kv_heads, 2 * decoder.head_dim)):
        other = _cache(decoder)
        other.kv = torch.zeros(decoder.num_layers, 2, ROWS, heads, 9, dim)
        other.prepare()
        with pytest.raises(RuntimeError, match=f"for {decoder.kv_heads} heads of {decoder.head_dim}"):
            forward(**given, lmvae=other)
    cache.select(torch.tensor([0, 1]))  # and no prepare() for the two rows that are left
    with pytest.raises(RuntimeError, match="for 2 rows"):
        forward(inputs_embeds=x[None, :2], position_ids=torch.zeros(1, 2, dtype=torch.int64), lmvae=cache)
