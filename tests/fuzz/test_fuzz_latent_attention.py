"""latent_attention and its decode form on random shapes, layouts, dtypes and options, against eager torch (make fuzz)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmvae_fast.kernels.latent_attention.visibility import VISIBILITIES
from tests.kernels.common import LAYOUTS, lay_out, require
from tests.kernels.test_latent_attention import HALF_AND_SINGLE, check, inputs
from tests.kernels.test_latent_attention_decode import caches
from tests.kernels.test_latent_attention_decode import check as check_decode

pytestmark = pytest.mark.fuzz


def options(max_length, max_dim):
    return {
        "lengths": st.lists(st.integers(0, max_length), min_size=1, max_size=4).filter(any),
        "kv_heads": st.integers(1, 3),
        "group": st.sampled_from([1, 1, 2, 3, 7]),
        "head_dim": st.integers(1, max_dim),
        "spare": st.integers(0, 20),  # slots beyond those that the longest sentence needs
        "visibility": st.sampled_from(VISIBILITIES),
        "window": st.none() | st.integers(1, 80),
        "softcap": st.none() | st.sampled_from([1.0, 30.0]),
        "layouts": st.lists(st.sampled_from(LAYOUTS), min_size=5, max_size=5),
        "seed": st.integers(0, 2**32),
    }


def run(name, dtype, lengths, kv_heads, group, head_dim, spare, visibility, layouts, seed, **kwargs):
    tensors, cu_seqlens = inputs(
        lengths, heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim, slots=max(lengths) + spare, dtype=dtype,
        seed=seed,
    )  # fmt: skip
    tensors = [lay_out(x, layout) for x, layout in zip(tensors, layouts, strict=True)]
    check(name, tensors, cu_seqlens, visibility, **kwargs)


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(dtype=st.sampled_from(HALF_AND_SINGLE), **options(70, 130))
def test_cpp(dtype, **kwargs):
    require("latent_attention", "cpp")
    run("cpp", dtype, **kwargs)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16]), **options(20, 40))
def test_triton(dtype, **kwargs):
    require("latent_attention", "triton")
    run("triton", dtype, **kwargs)


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["cpp", "cpp", "cpp", "triton"]),
    dtype=st.sampled_from(HALF_AND_SINGLE),
    positions=st.integers(1, 140),
    heads=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 5])),
    head_dim=st.integers(1, 130),
    layout=st.sampled_from(LAYOUTS),
    window=st.none() | st.integers(1, 150),
    softcap=st.none() | st.just(2.0),
    data=st.data(),
)
def test_decode(name, dtype, positions, heads, head_dim, layout, window, softcap, data):
    require("latent_attention_decode", name, dtype)
    tensors = caches(2, heads[0] * heads[1], heads[0], positions, head_dim, dtype, layout)
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, positions), min_size=2, max_size=2)))
    check_decode(name, tensors, lengths, window=window, softcap=softcap)
