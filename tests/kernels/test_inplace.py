"""Ops that write into their arguments: memory that several elements share is refused, and autograd hears of every write."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.backend import backend
from lmvae_fast.kernels.inplace import _separate, check_written
from lmvae_fast.kernels.latent_attention import latent_attention_step
from lmvae_fast.kernels.latent_kv import latent_kv, latent_kv_adamw

from .common import raises_naming, require

ALL = ("reference", "cpp", "triton")
SHARED = "share one place in memory"


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [
        ((2, 3), (3, 1)),  # dense
        ((3, 2), (1, 3)),  # turned
        ((2, 3), (10, 2)),  # every second column of wider rows
        ((4, 0), (0, 1)),  # nothing
        ((1, 5), (0, 1)),  # one row, whatever its stride
        ((1,), (0,)),
        ((), ()),
    ],
)
def test_elements_apart(sizes, strides):
    assert _separate(sizes, strides)


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [
        ((2, 3), (0, 1)),  # expanded rows
        ((2, 3), (3, 0)),  # expanded columns
        ((4, 3), (1, 1)),  # windows that slide by one
        ((2, 3), (2, 1)),  # rows that begin within the one before
        ((3, 2, 4), (8, 0, 1)),
    ],
)
def test_elements_that_share(sizes, strides):
    assert not _separate(sizes, strides)
    out = torch.zeros(64).as_strided(sizes, strides)
    with raises_naming(ValueError, "cache", SHARED, list(sizes), list(strides)):
        check_written(cache=out)


def test_two_arguments_that_are_one():
    x, y = torch.zeros(2, 3), torch.zeros(2, 3)
    check_written(a=x, b=y, c=x[:0], d=x[:0])
    with raises_naming(ValueError, "a and c", "same memory"):
        check_written(a=x, b=y, c=x.t())


def memory_case():
    z, weight = torch.randn(3, 5), torch.randn(1, 2, 1, 2, 4, 5)
    return z, weight, torch.zeros(1, 2, 3, 1, 2, 4)


def step_case():
    q, new = torch.randn(2, 2, 8), torch.randn(2, 1, 8)
    caches = torch.randn(2, 1, 6, 8), torch.randn(2, 1, 6, 8)
    return q, new, caches, torch.tensor([0, 3]), torch.tensor([1, 4])


def adamw_case():
    z, weight, memory = memory_case()
    scalars = {"step": torch.tensor(1.0), "lr": torch.tensor(0.1), "clip": torch.tensor(1.0)}
    return [weight, torch.zeros_like(weight), torch.zeros_like(weight)], [torch.randn_like(memory)], [z], scalars


@pytest.mark.parametrize("name", ALL)
def test_shared_memory_is_refused_before_anything_is_written(name):
    require("latent_kv", name)
    require("latent_attention_decode", name)
    z, weight, memory = memory_case()
    q, new, caches, places, lengths = step_case()
    state, grads, zs, scalars = adamw_case()
    with backend(name):
        with raises_naming(ValueError, "out", SHARED):
            latent_kv(z, weight, out=memory[:, :, :1].expand_as(memory))
        for i, which in enumerate(("k_cache", "v_cache")):
            expanded = list(caches)
            expanded[i] = caches[i][:1].expand_as(caches[i])
            before = [x.clone() for x in caches]
            with raises_naming(ValueError, which, SHARED):
                latent_attention_step(q, new, new, *expanded, places, lengths, scale=0.3)
            assert all(torch.equal(x, y) for x, y in zip(caches, before, strict=True))
        with raises_naming(ValueError, "k_cache and v_cache", "same memory"):
            latent_attention_step(q, new, new, caches[0], caches[0], places, lengths, scale=0.3)
        with raises_naming(ValueError, "exp_avg_sq", SHARED):
            latent_kv_adamw(*state[:2], state[2][..., :1, :].expand_as(weight), grads, zs, **scalars)
        with raises_naming(ValueError, "exp_avg and exp_avg_sq", "same memory"):
            latent_kv_adamw(state[0], state[1], state[1], grads, zs, **scalars)


@pytest.mark.parametrize("name", ALL)
def test_a_backward_that_needs_what_was_overwritten_raises(name):
    require("latent_kv", name)
    require("latent_attention_decode", name)
    z, weight, memory = memory_case()
    q, new, caches, places, lengths = step_case()
    state, grads, zs, scalars = adamw_case()

    def write_memory():
        latent_kv(z, weight, out=memory)

    def write_caches():
        latent_attention_step(q, new, new, *caches, places, lengths, scale=0.3)

    def write_state():
        latent_kv_adamw(*state, grads, zs, **scalars)

    for write, tensors in ((write_memory, [memory]), (write_caches, caches), (write_state, state)):
        for tensor in tensors:
            factor = torch.ones_like(tensor, requires_grad=True)
            product = (factor * tensor).sum()
            with backend(name), torch.no_grad():
                write()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.backward()


def test_inference_tensors_are_written_as_before():
    with torch.inference_mode():
        z, weight, memory = memory_case()
        latent_kv(z, weight, out=memory)
    assert memory.any()


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_a_step_that_is_refused_has_written_nothing(name):
    require("latent_attention_decode", name)
    q, new, caches, _, _ = step_case()
    before = [x.clone() for x in caches]
    cases = (
        ([0, -1], [1, 4], ("positions must be 0 to 5", -1, "row 1")),
        ([6, 0], [1, 4], ("positions must be 0 to 5", 6, "row 0")),
        ([0, 3], [1, 7], ("lengths", 6, 7)),
    )
    for places, lengths, words in cases:
        with backend(name), raises_naming(ValueError, *words):
            latent_attention_step(q, new, new, *caches, torch.tensor(places), torch.tensor(lengths), scale=0.3)
        assert all(torch.equal(x, y) for x, y in zip(caches, before, strict=True))
