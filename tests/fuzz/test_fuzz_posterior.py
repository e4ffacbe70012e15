"""posterior_sample on random shapes, layouts, dtypes and options, against its reference (make fuzz)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmvae_fast.kernels.posterior.op import KL_MODES
from tests.kernels.common import LAYOUTS, assert_op_within_error_rule, lay_out, on_backend, require, run_with_grads
from tests.kernels.test_posterior import plain, posterior_sample

pytestmark = pytest.mark.fuzz


def run(name, batch, dim, dtype, layouts, num_samples, kl, target, scale, seed, data_seed):
    generator = torch.Generator().manual_seed(data_seed)
    draw = [torch.randn(batch, dim, generator=generator) * scale for _ in range(2)]
    arguments = [lay_out(x.clamp(-30, 30).to(dtype), layout) for x, layout in zip(draw, layouts, strict=True)]
    chosen = {"seed": seed, "num_samples": num_samples, "kl": kl, "kl_target": target}
    function = on_backend(posterior_sample, name)
    if batch >= 16 and dim >= 16:
        assert_op_within_error_rule(function, plain, arguments, ("z", "kl"), ("mu", "logvar"), **chosen)
        return
    # The rule compares the largest of many errors; eager's few can all be tiny by luck. So: a few roundings of the fp64
    # result directly, at the size of the terms (noise of order one enters every output).
    outputs, grads, weights = run_with_grads(function, arguments, **chosen)
    expected, expected_grads, _ = run_with_grads(plain, [x.double() for x in arguments], weights, **chosen)
    for out, truth in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
        eps = torch.finfo(out.dtype).eps
        size = max(1.0, truth.abs().max().item(), *(x.abs().max().item() for x in arguments))
        torch.testing.assert_close(out.double(), truth, rtol=4 * eps, atol=8 * eps * size)


def options(max_batch, max_dim):
    return {
        "batch": st.integers(1, max_batch) | st.integers(16, max_batch),
        "dim": st.integers(1, max_dim),
        "layouts": st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
        "num_samples": st.integers(1, 3),
        "kl": st.sampled_from(KL_MODES[:3:2]),  # without thresholds: see test_thresholds
        "target": st.sampled_from([0.0, 0.1, 1.0]),
        "scale": st.sampled_from([0.01, 1.0, 10.0]),
        "seed": st.integers(0, 2**64 - 1),
        "data_seed": st.integers(0, 2**32),
    }


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), **options(40, 300))
def test_cpp(dtype, **kwargs):
    require("posterior_sample", "cpp")
    if dtype == torch.float16 and kwargs["scale"] > 1:
        kwargs["scale"] = 1.0  # e^30 and its square root leave fp16's range: a different test's subject
    run("cpp", dtype=dtype, **kwargs)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16]), **options(18, 80))
def test_triton(dtype, **kwargs):
    require("posterior_sample", "triton")
    run("triton", dtype=dtype, **kwargs)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kl=st.sampled_from(["dim_threshold", "sample_threshold"]),
    target=st.floats(0.05, 30.0),
    batch=st.integers(1, 30),
    dim=st.integers(1, 200),
    data_seed=st.integers(0, 2**32),
)
def test_thresholds(kl, target, batch, dim, data_seed):
    """A divergence within rounding of the threshold may fall on either side; everywhere else both must agree."""
    require("posterior_sample", "cpp")
    generator = torch.Generator().manual_seed(data_seed)
    mu, logvar = (torch.randn(batch, dim, generator=generator) for _ in range(2))
    terms = 0.5 * (mu.double().square() + logvar.double().exp() - logvar.double() - 1)
    value = terms if kl == "dim_threshold" else terms.sum(-1, keepdim=True)
    near = ((value - target).abs() < 1e-4 * max(1.0, target)).any(-1)
    keep = ~near
    if keep.any():
        out = on_backend(posterior_sample, "cpp")(mu[keep], logvar[keep], seed=1, kl=kl, kl_target=target)[1]
        expected = plain(mu[keep], logvar[keep], seed=1, kl=kl, kl_target=target)[1]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
