"""latent_kv on random shapes, strides, dtypes and options against its reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmvae_fast.kernels import philox
from lmvae_fast.kernels.backend import backend
from lmvae_fast.kernels.latent_kv import latent_kv, latent_kv_adamw, latent_kv_norm, reference
from tests.kernels.common import (
    LAYOUTS,
    assert_op_within_error_rule,
    assert_within_error_rule,
    lay_out,
    on_backend,
    require,
)

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SIZES = st.tuples(
    st.integers(1, 3),
    st.integers(0, 40),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 140),
    st.integers(1, 150),
)  # L, B, Hkv, M, D, nz


def draw_inputs(shape, dtype, layout, seed, bias=True):
    generator = torch.Generator().manual_seed(seed)
    layers, batch, heads, slots, dim, nz = shape
    z = torch.randn(batch, nz, generator=generator)
    weight = torch.randn(layers, 2, heads, slots, dim, nz, generator=generator) / nz**0.5
    made = [z, weight] + ([torch.randn(weight.shape[:-1], generator=generator)] if bias else [])
    return [lay_out(x.to(dtype), layout if x.numel() else "dense") for x in made]


def plain(z, weight, bias=None, *, dropout=0.0, seed=None, dtype=None):
    pair = philox.seed_tensor(seed, z.device) if dropout > 0.0 else None
    # Dense, as torch's own bf16 product on CPU gives NaN where NaN lies in the gaps between rows.
    return reference.latent_kv(z.contiguous(), weight.contiguous(), bias, dropout, pair, dtype or weight.dtype)


@pytest.mark.fuzz
@settings(max_examples=400, deadline=None)
@given(
    shape=SIZES, dtype=DTYPES, memory=DTYPES, layout=st.sampled_from(LAYOUTS), bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1, 0.7]), seed=st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_values_and_gradients(shape, dtype, memory, layout, bias, dropout, seed):
    require("latent_kv", "cpp", dtype)
    arguments = draw_inputs(shape, dtype, layout, seed % 2**31, bias)
    names = ("z", "weight", "bias")[: len(arguments)]
    function = on_backend(latent_kv, "cpp")
    assert_op_within_error_rule(
        function, plain, arguments, ("memory",), names, dropout=dropout, seed=seed, dtype=memory
    )


@pytest.mark.fuzz
@settings(max_examples=150, deadline=None)
@given(
    shape=SIZES, memory=DTYPES, first=st.integers(0, 3), step=st.integers(1, 3), more=st.integers(0, 3),
    spare=st.integers(0, 2), seed=st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_caches(shape, memory, first, step, more, spare, seed):
    require("latent_kv", "cpp")
    z, weight, bias = draw_inputs(shape, torch.float32, "dense", seed)
    layers, batch, heads, slots, dim, _ = shape
    cache = torch.full((layers, 2, batch + spare, heads + spare, first + slots * step + more, dim + spare), 7.0)
    cache = cache.to(memory)

    def view(x):
        return x[:, :, :batch, spare:, first : first + slots * step : step, :dim]

    with backend("cpp"):
        latent_kv(z, weight, bias, out=view(cache))
    torch.testing.assert_close(view(cache), plain(z, weight, bias).to(memory), rtol=1e-2, atol=1e-4)
    expected = torch.full_like(cache, 7.0)
    view(expected).copy_(view(cache))
    assert torch.equal(cache, expected)


@pytest.mark.fuzz
@settings(max_examples=150, deadline=None)
@given(
    shape=SIZES, dtype=DTYPES, memory=DTYPES, moments=DTYPES, batches=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    dropout=st.sampled_from([0.0, 0.4]), step=st.integers(1, 1000), seed=st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_adamw(shape, dtype, memory, moments, batches, dropout, step, seed):
    require("latent_kv", "cpp", dtype)
    layers, _, heads, slots, dim, nz = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(layers, 2, heads, slots, dim, nz, generator=generator).to(dtype)
    zs = [torch.randn(b, nz, generator=generator).to(dtype) for b in batches]
    grads = [torch.randn(layers, 2, b, heads, slots, dim, generator=generator).to(memory) for b in batches]
    seeds = [torch.tensor([seed, i]) for i in range(len(batches))]
    first = [weight, torch.randn(weight.shape, generator=generator).to(moments)]
    first.append(torch.rand(weight.shape, generator=generator).to(moments))
    scalars = {"step": torch.tensor(float(step)), "lr": torch.tensor(0.01), "clip": torch.tensor(0.3)}
    results = {}
    for name in ("cpp", "reference"):
        state = [x.clone() for x in first]
        with backend(name):
            norm = latent_kv_norm(weight, grads, zs, dropout=dropout, seeds=seeds)
            latent_kv_adamw(*state, grads, zs, dropout=dropout, seeds=seeds, **scalars)
        results[name] = [norm, *state]
    wide = [x.double() for x in first]
    dw = reference.weight_gradient(wide[0], grads, zs, dropout, seeds)
    reference.adamw(*wide, dw * scalars["clip"], scalars["step"], scalars["lr"], 0.9, 0.999, 1e-8, 1e-2)
    truth = [dw.square().sum(), *wide]
    for label, ours, eager, true in zip("nwmv", results["cpp"], results["reference"], truth, strict=True):
        assert_within_error_rule(label, ours, eager, true, factor=3.0)
