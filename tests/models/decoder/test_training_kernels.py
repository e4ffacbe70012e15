"""Bodies written out for training as a GPU runs them: torch's products and Triton's kernels, here interpreted."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmvae_fast.kernels.backend import backend
from lmvae_fast.models.decoder.cache import LatentCache
from lmvae_fast.models.decoder.packed_products import exchanged
from lmvae_fast.models.decoder.prepared_weights import exchanges
from lmvae_fast.models.decoder.recorded_step import CAPTURES
from lmvae_fast.models.decoder.training_body import trained_through
from lmvae_fast.models.injection import Injection
from lmvae_fast.testing import make_model
from tests.generation.replay import RecordedOperations
from tests.kernels.common import GRAD_FACTOR, VALUE_FACTOR, assert_within_error_rule, require

from .test_training_body import NAMES, _decoder, _figures

FAMILIES = ("gpt2", "llama", "qwen3")
#: What gives a tensor another shape or room for a result, and launches nothing.
_NO_KERNEL = (
    "view", "_unsafe_view", "reshape", "t", "transpose", "slice", "split", "split_with_sizes", "select", "squeeze", "unsqueeze",
    "detach", "alias", "expand", "as_strided", "empty", "new_empty", "empty_like", "permute", "unbind",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _interpreter():
    require("frozen_layer", "triton")


class Launches(TorchDispatchMode):
    """Names of the operations that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split(".")[1] if "." in str(func) else str(func)
        if name not in _NO_KERNEL:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_equal_the_modules(family):
    decoder = _decoder(family)
    plain = decoder.body.forward
    with backend("triton"), trained_through(decoder) as body:
        ours = _figures(decoder, decoder.body, torch.float32)
        assert body.runs == "prepared layers"
    theirs = _figures(decoder, plain, torch.float32)
    wide = _decoder(family, torch.float64)
    truth = _figures(wide, wide.body.forward, torch.float64)
    for name in NAMES:
        factor = VALUE_FACTOR if name == "values" else GRAD_FACTOR
        assert_within_error_rule(name, ours[name], theirs[name], truth[name], factor=factor)


@pytest.mark.parametrize(("family", "forward", "backward"), [("gpt2", 8, 9), ("llama", 9, 11)])
def test_launches_of_a_layer(family, forward, backward):
    found = []
    for layers in (2, 3):
        decoder = _decoder(family, layers=layers)
        with backend("triton"), trained_through(decoder):
            _figures(decoder, decoder.body, torch.float32)  # prepares and examines
            with Launches() as whole:
                _figures(decoder, decoder.body, torch.float32)
            with Launches() as half, torch.no_grad():
                _hidden(decoder)
        found.append((len(half.found), len(whole.found)))
    (fewer, fewer_whole), (more, more_whole) = found
    assert more - fewer == forward
    assert more_whole - fewer_whole == forward + backward


def _hidden(decoder):
    from lmvae_fast.models.decoder.attention import PackedAttention

    shape = (decoder.num_layers, 2, 2, decoder.kv_heads, 3, decoder.head_dim)
    attention = PackedAttention(torch.randn(shape), "prefix", torch.tensor([0, 4, 9], dtype=torch.int32), 5)
    given = {"position_ids": torch.arange(9)[None], "use_cache": False, "lmvae": attention}
    return decoder.body(inputs_embeds=torch.randn(1, 9, decoder.hidden_size), **given)


@torch.no_grad()
def _step(decoder):
    cache = LatentCache(
        layers=decoder.num_layers, kv_heads=decoder.kv_heads, head_dim=decoder.head_dim, batch=3, slots=2, max_tokens=5,
        visibility="prefix", dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    cache.memory.copy_(torch.randn(cache.memory.shape, generator=torch.Generator().manual_seed(0)))
    with Launches() as counted:
        logits = decoder.step(torch.tensor([1, 5, 3]), cache, Injection("prefix", cache.memory))
    return logits, len(counted.found)


@pytest.mark.parametrize(("family", "launches"), [("gpt2", 8), ("llama", 9)])
def test_a_decode_step_runs_the_same_layers(family, launches):
    counts = []
    for layers in (2, 3):
        decoder = _decoder(family, layers=layers)
        expected, _ = _step(decoder)
        with backend("triton"):
            ((body, _),) = layers_of = exchanges(decoder, 3)
            assert body is decoder.body
            with exchanged(layers_of):
                found, count = _step(decoder)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        counts.append(count)
    assert counts[1] - counts[0] == launches


def test_texts_through_them_are_the_same():
    model = make_model("llama")
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    expected = model.decode(z, max_new_tokens=4)
    assert any(expected)
    with backend("triton"):
        assert model.decode(z, max_new_tokens=4) == expected


def test_recordings_over_layers_that_are_no_more_are_not_kept(monkeypatch):
    """What a recording reads is a copy of some weights: one of others is made when they have changed."""
    monkeypatch.setitem(CAPTURES, "cpu", RecordedOperations)
    model = make_model("llama", max_len=9)
    z = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    with backend("triton"):
        before = model.decode(z, max_new_tokens=6)
        with torch.no_grad():
            for layer in model.decoder.body.layers:
                layer.self_attn.v_proj.weight.mul_(-3.0)
        after = model.decode(z, max_new_tokens=6)
    assert after == model.decode(z, max_new_tokens=6) != before
