"""A training pass in one call: the bits that the layers give (the inputs' gradient is rounded once less), only where it may."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import lmvae_fast as lf
from lmvae_fast.models.decoder import frozen_products, training_call
from lmvae_fast.models.decoder.attention import PackedAttention
from lmvae_fast.models.decoder.large_pages import LargePages
from lmvae_fast.models.decoder.training_call import TrainingCall, TrainingPass
from lmvae_fast.models.decoder.training_layers import written_out
from lmvae_fast.testing import make_decoder
from tests.models.decoder.test_decode_body import Names

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
SLOTS, OFFSETS = 9, (0, 4, 4, 11)  # one sentence has no tokens
WANTED = (("x", "memory"), ("memory",), ("x",))


@pytest.fixture(autouse=True)
def _extension():
    if not lf.kernels.backend.extension()[0] or not hasattr(torch.classes.lmvae_fast, "TrainingBody"):
        pytest.skip("the C++ extension is not there")


def _decoder(family, dtype=torch.float32, window=None):
    torch.manual_seed(0)
    _, decoder = make_decoder(family, window=window)
    for parameter in decoder.model.parameters():  # biases and norms that do something
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    decoder.model.to(dtype)
    return decoder


def _given(decoder, *, memory_dtype=None, slots=SLOTS, expanded=False):
    draw = torch.Generator().manual_seed(1)
    tokens = OFFSETS[-1]
    x = torch.randn(1, tokens, decoder.hidden_size, generator=draw).to(decoder.dtype)
    shape = (decoder.num_layers, 2, 1 if expanded else len(OFFSETS) - 1, decoder.kv_heads, slots, decoder.head_dim)
    memory = torch.randn(shape, generator=draw).to(memory_dtype or decoder.dtype)
    return x, memory.expand(-1, -1, len(OFFSETS) - 1, -1, -1, -1) if expanded else memory


def _states(forward, x, memory, visibility="prefix"):
    attention = PackedAttention(memory, visibility, torch.tensor(OFFSETS, dtype=torch.int32), 7)
    positions = torch.cat([torch.arange(3, 3 + b - a) for a, b in itertools.pairwise(OFFSETS)])
    given = {"position_ids": positions.unsqueeze(0), "use_cache": False, "lmvae": attention}
    return forward(inputs_embeds=x, **given).last_hidden_state


def _pass(forward, given, wanted=("x", "memory"), visibility="prefix"):
    """Hidden states, and the gradients of a weighted sum of them by those that are wanted."""
    x, memory = (
        None if tensor is None else tensor.detach().requires_grad_(name in wanted)
        for name, tensor in zip(("x", "memory"), given, strict=True)
    )
    hidden = _states(forward, x, memory, visibility)
    leaves = [leaf for leaf in (x, memory) if leaf is not None and leaf.requires_grad]
    weights = torch.linspace(-1, 1, hidden.numel()).sin().view(hidden.shape).to(hidden.dtype)
    grads = torch.autograd.grad(hidden, leaves, weights) if leaves else ()
    return hidden, *grads


def _both(decoder, monkeypatch, given, **options):
    """The same pass in one call, and through the layers."""
    forward, calls = written_out(decoder, LargePages(), TrainingCall), []
    apply = TrainingPass.apply
    with monkeypatch.context() as patch:
        patch.setattr(TrainingPass, "apply", lambda *given: calls.append(1) or apply(*given))
        ours = _pass(forward, given, **options)
        assert calls == [1]
        patch.setattr(TrainingCall, "_serves", lambda *given: False)
        theirs = _pass(forward, given, **options)
        assert calls == [1]
    return ours, theirs


def _equal(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        assert torch.isfinite(mine).all() and mine.abs().max() > 0
        if mine.shape == ours[0].shape and mine is not ours[0]:  # by what goes in: a sum of two, here rounded once
            close = torch.finfo(mine.dtype).eps * other.abs().max().item()
            torch.testing.assert_close(mine, other, rtol=2 * torch.finfo(mine.dtype).eps, atol=close)
        else:
            assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "window"),
    [*((family, None) for family in FAMILIES), *((family, 3) for family in FAMILIES[2:4] + FAMILIES[6:])],
)
def test_the_same_bits_as_the_layers(monkeypatch, family, window, dtype):
    decoder = _decoder(family, dtype, window)
    _equal(*_both(decoder, monkeypatch, _given(decoder)))


@pytest.mark.parametrize("by", ["onednn", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_either_product(monkeypatch, dtype, by):
    if by == "onednn" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bf16 here")
    monkeypatch.setattr(frozen_products, "training_product", lambda dtype: by)
    decoder = _decoder("gpt2", dtype)
    _equal(*_both(decoder, monkeypatch, _given(decoder)))


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("visibility", ["prefix", "rolling", "interleaved"])
def test_what_is_wanted_under_every_visibility(monkeypatch, visibility, wanted):
    decoder = _decoder("qwen3")
    ours, theirs = _both(decoder, monkeypatch, _given(decoder), wanted=wanted, visibility=visibility)
    assert len(ours) == 1 + len(wanted)
    _equal(ours, theirs)


@pytest.mark.parametrize("memory", ["none", "no slots", "expanded", "another dtype"])
def test_memories(monkeypatch, memory):
    decoder = _decoder("llama", torch.bfloat16)
    options = {
        "no slots": {"slots": 0},
        "expanded": {"expanded": True},
        "another dtype": {"memory_dtype": torch.float32},
    }
    x, given = _given(decoder, **options.get(memory, {}))
    without = memory in ("none", "no slots")
    both = _both(
        decoder, monkeypatch, (x, None if memory == "none" else given), wanted=("x",) if without else ("x", "memory")
    )
    _equal(*both)
    if memory == "another dtype":
        assert both[0][2].dtype == torch.float32


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch):
    decoder = _decoder("gpt2")
    forward = written_out(decoder, LargePages(), TrainingCall)
    want, *_ = _pass(forward, _given(decoder))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        got = _pass(forward, _given(decoder), wanted=())
        assert not kept and len(got) == 1 and torch.equal(got[0], want)
    body, x = _body(forward), torch.randn(OFFSETS[-1], decoder.hidden_size)
    around = (torch.tensor(OFFSETS, dtype=torch.int32), 0, 7, [])
    assert len(body.forward(x, None, *around, False)) == 1
    assert len(body.forward(x, None, *around, True)) == 1 + 8 * decoder.num_layers + 2
    asked, apply = [], TrainingPass.apply
    monkeypatch.setattr(TrainingPass, "apply", lambda *given: asked.append(given[-1]) or apply(*given))
    x, memory = (tensor.requires_grad_() for tensor in _given(decoder))
    _states(forward, x, memory)
    _states(forward, x.detach(), memory.detach())
    with torch.no_grad():
        _states(forward, x, memory)
    assert asked == [True, False, False]


def _body(forward):
    """What csrc has, of a body written out."""
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__, strict=True))
    return cells["layers"].cell_contents._body


def test_gradients_again_and_twice():
    """A graph that is kept gives its gradients again; none of its own are differentiated."""
    decoder = _decoder("gpt2")
    forward = written_out(decoder, LargePages(), TrainingCall)
    x, memory = (tensor.requires_grad_() for tensor in _given(decoder))
    hidden = _states(forward, x, memory)
    first = torch.autograd.grad((hidden**2).sum(), (x, memory), retain_graph=True)
    again = torch.autograd.grad((hidden**2).sum(), (x, memory), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again[0].sum().backward()


def test_what_one_call_cannot_take_goes_through_the_layers(monkeypatch):
    decoder = _decoder("llama")
    forward = written_out(decoder, LargePages(), TrainingCall)
    given = _given(decoder)
    want = _pass(forward, given)
    monkeypatch.setattr(TrainingPass, "apply", lambda *given: pytest.fail("was called"))
    for backend in ("reference", "cpp"):
        if backend == "reference":
            with lf.backend(backend):
                got = _pass(forward, given)
            assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(got, want, strict=True))
        else:
            with lf.backend(backend), pytest.raises(pytest.fail.Exception, match="was called"):
                _pass(forward, given)
    with FlopCounterMode(display=False), Names() as seen:
        got = _pass(forward, given, wanted=())
    assert seen.names.count("lmvae_fast::latent_attention_fwd") == decoder.num_layers
    assert torch.equal(got[0], want[0])
    x, memory = given
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):  # by the layers' function
        _states(forward, forward_ad.make_dual(x, x), memory)


def test_an_extension_without_it_and_a_layer_without_prepared_products_leave_the_layers(monkeypatch):
    decoder = _decoder("gpt2")
    want = _pass(written_out(decoder, LargePages(), TrainingCall), _given(decoder))
    monkeypatch.setattr(TrainingPass, "apply", lambda *given: pytest.fail("was called"))
    with monkeypatch.context() as patch:
        patch.setattr(training_call, "extension", lambda: (False, "not built"))
        got = _pass(written_out(decoder, LargePages(), TrainingCall), _given(decoder))
        _equal(got, want)
    monkeypatch.setattr(frozen_products, "training_product", lambda dtype: "plain")
    got = _pass(written_out(decoder, LargePages(), TrainingCall), _given(decoder))
    assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(got, want, strict=True))


class Marked(torch.Tensor):
    """A kind of tensor of its own, whose operations leave it what it is."""


def test_tensors_of_another_kind_go_through_the_layers(monkeypatch):
    decoder = _decoder("llama")
    forward = written_out(decoder, LargePages(), TrainingCall)
    x, memory = _given(decoder)
    want = _states(forward, x, memory)
    monkeypatch.setattr(TrainingPass, "apply", lambda *given: pytest.fail("was called"))
    for given in ((x.as_subclass(Marked), memory), (x, memory.as_subclass(Marked))):
        assert torch.equal(_states(forward, *given).as_subclass(torch.Tensor), want)


@pytest.mark.parametrize("dim", [2, 3, 5])
@pytest.mark.parametrize("change", ["one less", "one more"])
def test_a_memory_that_does_not_fit_is_refused_as_by_the_layers(dim, change):
    decoder = _decoder("llama")
    forward = written_out(decoder, LargePages(), TrainingCall)
    x, memory = _given(decoder)
    shape = list(memory.shape)
    shape[dim] += 1 if change == "one more" else -1
    with pytest.raises(ValueError, match="memory_k must be"):
        _states(forward, x, torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": torch.zeros(1, 2, 3, 4, 9, 8)}, "a memory of"),
        ({"memory": torch.zeros(2, 2, 1, 4, 9, 8)}, "a memory of"),
        ({"memory": torch.zeros(2, 2, 3, 2, 9, 8)}, "a memory of"),
        ({"memory": torch.zeros(2, 2, 3, 4, 9, 16)}, "a memory of"),
        ({"x": torch.zeros(11, 31)}, "rows"),
        ({"offsets": torch.tensor(OFFSETS)}, "offsets int32"),
        ({"offsets": torch.zeros(0, dtype=torch.int32)}, "offsets int32"),
        ({"memory": torch.zeros(2, 2, 3, 4, 9, 8, dtype=torch.float64)}, "a memory of"),
        ({"turns": [torch.zeros(11, 16)]}, "cosines and sines"),
        ({"x": torch.zeros(11)}, "rows"),
    ],
)
def test_bad_calls_are_refused(change, message):
    decoder = _decoder("gpt2")
    forward = written_out(decoder, LargePages(), TrainingCall)
    body = _body(forward)
    offsets = torch.tensor(OFFSETS, dtype=torch.int32)
    given = {
        "x": torch.zeros(OFFSETS[-1], decoder.hidden_size),
        "memory": None,
        "offsets": offsets,
        "turns": [],
    } | change
    with pytest.raises(RuntimeError, match=message):
        body.forward(given["x"], given["memory"], given["offsets"], 0, 7, given["turns"], True)
    with pytest.raises(RuntimeError, match="are read"):
        body.backward(torch.zeros(OFFSETS[-1], decoder.hidden_size), [], None, offsets, 0, 7, [], True)
