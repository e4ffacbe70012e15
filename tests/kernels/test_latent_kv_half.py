"""Weights of bf16, and steps of an fp32 weight by gradients of bf16 memory: matrix units can multiply them as they are."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lmvae_fast.kernels.backend import backend
from lmvae_fast.kernels.latent_kv import latent_kv, latent_kv_adamw, latent_kv_norm

from .common import GuardedAllocations, assert_within_error_rule, require

OPTIONS = {"betas": (0.8, 0.99), "eps": 1.0, "weight_decay": 0.1}


def _draw(shape, nz, batches):
    weight = torch.randn(*shape, nz)
    grads = [torch.randn(*shape[:2], b, *shape[2:]).bfloat16() for b in batches]
    return weight, grads, [torch.randn(b, nz) for b in batches]


def _step(name, weight, grads, zs, dropout=0.0, wide=torch.float32):
    """exp_avg (a multiple of the gradient), exp_avg_sq and weight after one step, and the gradient's norm."""
    seeds = [torch.tensor([i, 3]) for i in range(len(grads))] if dropout else []
    state = [weight.to(wide, copy=True), *(torch.zeros(weight.shape, dtype=wide) for _ in range(2))]
    scalars = {"step": torch.ones(()), "lr": torch.full((), 0.05, dtype=torch.float64), "clip": torch.full((), 0.7)}
    grads, zs = ([x.to(wide) if wide == torch.float64 else x for x in grads], [z.to(wide) for z in zs])
    with backend(name):
        norm = latent_kv_norm(state[0], grads, zs, dropout=dropout, seeds=seeds)
        latent_kv_adamw(*state, grads, zs, dropout=dropout, seeds=seeds, **scalars, **OPTIONS)
    return {"exp_avg": state[1], "exp_avg_sq": state[2], "weight": state[0], "norm": norm}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("shape", "nz", "batches"),
    [
        ((2, 2, 2, 3, 5), 19, (12,)),
        ((1, 2, 3, 5, 7), 33, (32,)),  # the norm by the latents' products
        ((1, 2, 1, 3, 64), 128, (33,)),
        ((1, 2, 2, 4, 32), 16, (40, 5, 30)),  # the norm by tiles of the gradient
        ((1, 2, 2, 4, 32), 64, (4, 3)),
    ],
)
def test_error_rule(shape, nz, batches, dropout):
    require("latent_kv", "cpp")
    given = _draw(shape, nz, batches)
    ours = _step("cpp", *given, dropout)
    eager = _step("reference", *given, dropout)
    truth = _step("reference", *given, dropout, wide=torch.float64)
    for name, value in ours.items():
        assert_within_error_rule(name, value, eager[name], truth[name])


@pytest.mark.parametrize("memory", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", [1, 5, 33, 64])
@pytest.mark.parametrize(("shape", "nz"), [((1, 2, 1, 1, 16), 32), ((2, 2, 2, 3, 24), 64), ((1, 2, 3, 5, 7), 128)])
def test_weights_of_bf16(shape, nz, batch, memory):
    """Whole chunks, tails of 16 rows and of others, slots by themselves."""
    require("latent_kv", "cpp")
    weight, bias = torch.randn(*shape, nz).bfloat16(), torch.randn(shape).bfloat16()
    z = torch.randn(batch, nz).bfloat16()
    for slots in (slice(None), slice(shape[3] // 2, shape[3] // 2 + 1)):
        given = z, weight[:, :, :, slots], bias[:, :, :, slots]
        options = {"dropout": 0.3, "seed": torch.tensor([0, 3])}
        with backend("cpp"):
            ours = latent_kv(*given, **options, dtype=memory)
        with backend("reference"):
            eager = latent_kv(*given, **options, dtype=memory)
            truth = latent_kv(*(x.double() for x in given), **options)
        assert_within_error_rule(f"{slots}", ours, eager, truth)


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_inf_and_nan_in_weights_of_bf16(number):
    require("latent_kv", "cpp")
    weight, z = torch.rand(1, 2, 1, 4, 16, 32).bfloat16() + 0.1, torch.rand(3, 32).bfloat16() + 0.1
    weight[0, 1, 0, 2, 3, 4] = number
    ours, plain = [], []
    for name, found in (("cpp", ours), ("reference", plain)):
        with backend(name):
            found.append(latent_kv(z, weight).float())
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, True), (False, True, False)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dense_gradients(wanted, dropout):
    """Of z, weight and bias in one pass, by the same gradients."""
    require("latent_kv", "cpp")
    weight, (grad,), (z,) = _draw((1, 2, 2, 5, 24), 37, (19,))
    bias = torch.randn(weight.shape[:-1])

    def gradients(name, wide):
        leaves = [x.to(wide).requires_grad_(need) for x, need in zip((z, weight, bias), wanted, strict=True)]
        with backend(name):
            dtype = None if wide == torch.float64 else torch.bfloat16
            memory = latent_kv(*leaves, dropout=dropout, seed=torch.tensor([0, 3]), dtype=dtype)
            return torch.autograd.grad(memory, [x for x in leaves if x.requires_grad], grad.to(memory.dtype))

    three = (
        gradients("cpp", torch.float32),
        gradients("reference", torch.float32),
        gradients("reference", torch.float64),
    )
    for ours, eager, truth in zip(*three, strict=True):
        assert_within_error_rule(str(list(truth.shape)), ours, eager, truth)


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("where", ["gradient", "latent"])
def test_inf_and_nan_are_where_the_reference_has_them(number, where):
    require("latent_kv", "cpp")
    weight, (grad,), (z,) = _draw((1, 2, 2, 3, 40), 48, (32,))
    z = z.abs() + 0.1
    if where == "gradient":
        grad[0, 1, 7, 1, 2, 3] = number
    else:
        z[9, 11] = number
        grad = grad.abs() + 0.1
    ours, plain = (_step(name, weight, [grad], [z])["exp_avg"] for name in ("cpp", "reference"))
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(ours), kind(plain))
    finite = plain.isfinite()
    torch.testing.assert_close(ours[finite], plain[finite], rtol=1e-5, atol=1e-5)


def test_nothing_is_written_outside():
    require("latent_kv", "cpp")
    given = _draw((1, 2, 3, 5, 7), 33, (17,))
    with GuardedAllocations() as guarded:
        _step("cpp", *given, 0.3)
    guarded.check()


_READS = """
import ctypes, mmap, torch
from lmvae_fast.kernels.latent_kv import latent_kv

libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE

def at_the_end(x):  # a copy behind which nothing may be read
    size = x.numel() * x.element_size()
    pages = mmap.mmap(-1, (size // page + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert libc.mprotect(ctypes.c_void_p(start + len(pages) - page), page, 0) == 0
    room = torch.frombuffer(pages, dtype=x.dtype, count=x.numel(), offset=len(pages) - page - size)
    return room.view(x.shape).copy_(x)

for nz in (16, 32, 37, 48, 64):
    for batch in (1, 12, 33):
        for dtype in (torch.float32, torch.bfloat16):
            weight, bias = torch.randn(1, 2, 1, 3, 24, nz).to(dtype), torch.randn(1, 2, 1, 3, 24).to(dtype)
            z = torch.randn(batch, nz).to(dtype)
            leaves = [at_the_end(x).requires_grad_() for x in (z, weight, bias)]
            memory = latent_kv(*leaves, dtype=torch.bfloat16)
            torch.autograd.grad(memory, leaves, at_the_end(torch.randn(memory.shape).bfloat16()))
"""


def test_nothing_is_read_behind_what_is_given():
    require("latent_kv", "cpp")
    subprocess.run([sys.executable, "-c", _READS], check=True)


def test_threads_change_nothing():
    require("latent_kv", "cpp")
    given, threads = _draw((2, 2, 2, 9, 64), 128, (32,)), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(_step("cpp", *given, 0.3))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())
