"""latent_attention and its decode form on random shapes, layouts, dtypes and options, against eager torch (make fuzz)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmvae_fast.kernels.latent_attention.visibility import VISIBILITIES
from tests.kernels.common import LAYOUTS, lay_out, on_backend, require, run_with_grads
from tests.kernels.test_latent_attention import HALF_AND_SINGLE, attend, check, inputs, plain
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
    if head_dim >= 16 and sum(lengths) >= 16:
        check(name, tensors, cu_seqlens, visibility, **kwargs)
    else:
        few = dict(cu_seqlens=cu_seqlens, visibility=visibility, scale=head_dim**-0.5, **kwargs)
        check_few(name, tensors, max(lengths) * group, few)


def check_few(name, tensors, rows, options):
    """The rule compares the largest of many errors; eager's few can all be tiny by luck. So: roundings of the sums' terms.

    rows: how many queries may see one key.
    """
    outputs, grads, weights = run_with_grads(on_backend(attend, name), tensors, **options)
    expected, expected_grads, _ = run_with_grads(plain, [x.double() for x in tensors], weights, **options)
    q, k, v = (max(x.abs().max().item() for x in group) for group in (tensors[:1], tensors[1::2], tensors[2::2]))
    pull, head_dim = weights[0].abs().max().item(), tensors[0].shape[-1]
    score = options["scale"] * head_dim * q * k  # the most it can be; its rounding is a relative error of a probability
    d_score = 2 * head_dim * pull * v * options["scale"]
    sizes = [v, d_score * k, d_score * q * rows, pull * rows, d_score * q * rows, pull * rows]
    eps = torch.finfo(tensors[0].dtype).eps
    for ours, truth, size in zip([*outputs, *grads], [*expected, *expected_grads], sizes, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=8 * eps * size * (1 + score))


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
