"""aggregate_logpdf on random shapes, groups, layouts, dtypes and options, against its reference (make fuzz)."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmvae_fast.kernels.aggregate_logpdf import aggregate_logpdf
from tests.kernels.common import LAYOUTS, assert_op_within_error_rule, lay_out, on_backend, require, run_with_grads
from tests.kernels.test_aggregate_logpdf import plain

pytestmark = pytest.mark.fuzz


def offsets(sizes):
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)


def run(name, dtype, samples, groups, dim, per_dim, layouts, ids, min_var, spread, data_seed):
    generator = torch.Generator().manual_seed(data_seed)
    z_sizes, sizes = zip(*groups, strict=True)
    shapes = ((samples, sum(z_sizes), dim), (sum(sizes), dim), (sum(sizes), dim))
    z, mu, logvar = (torch.randn(shape, generator=generator) for shape in shapes)
    draw = [z * (1.0 + spread), mu * spread, 0.5 * logvar]
    arguments = [lay_out(x.to(dtype), layout) for x, layout in zip(draw, layouts, strict=True)]
    options = {"per_dim": per_dim, "min_var": min_var}
    if ids:
        pair = [torch.repeat_interleave(torch.arange(len(s)), torch.tensor(s)) for s in (z_sizes, sizes)]
        mixed = [x[torch.randperm(len(x), generator=generator)] for x in pair]
        options["groups"] = tuple(mixed)
    else:
        options |= {"cu_z": offsets(z_sizes), "cu_posteriors": offsets(sizes)}
    function = on_backend(aggregate_logpdf, name)
    if samples * sum(z_sizes) >= 16 and sum(sizes) >= 16 and dim >= 16:
        assert_op_within_error_rule(function, plain, arguments, ("logq",), ("z", "mu", "logvar"), **options)
        return
    # The rule compares the largest of many errors; eager's few can all be tiny by luck. So: a few roundings of the fp64
    # result directly, at the size of what was summed.
    outputs, grads, weights = run_with_grads(function, arguments, **options)
    expected, expected_grads, _ = run_with_grads(plain, [x.double() for x in arguments], weights, **options)
    for out, truth in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
        if not truth.numel():
            continue
        # a density's rounding grows with the squared distance, and goes into weights as it is
        size = max(1.0, truth.abs().max().item()) * (1.0 + dim * (2.0 * spread + 2.0) ** 2)
        eps = torch.finfo(torch.float32).eps
        last = torch.finfo(out.dtype).eps if out.dtype != torch.float32 else 0.0
        torch.testing.assert_close(out.double(), truth, rtol=8 * eps + last, atol=8 * eps * size + last * 1e-2)


def options(max_samples, max_rows, max_posteriors, max_dim):
    group = st.tuples(st.integers(0, max_rows), st.integers(1, max_posteriors))
    return {
        "samples": st.integers(1, max_samples),
        "groups": st.lists(group, min_size=1, max_size=4),
        "dim": st.integers(1, max_dim),
        "per_dim": st.booleans(),
        "layouts": st.tuples(*[st.sampled_from([x for x in LAYOUTS if x != "expanded"])] * 3),
        "ids": st.booleans(),
        "min_var": st.sampled_from([0.0, 1e-4, 0.5]),
        "spread": st.sampled_from([0.0, 0.3, 1.0, 3.0]),
        "data_seed": st.integers(0, 2**32),
    }


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), **options(3, 40, 40, 150))
def test_cpp(dtype, **kwargs):
    require("aggregate_logpdf", "cpp")
    run("cpp", dtype, **kwargs)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16]), **options(2, 6, 6, 40))
def test_triton(dtype, **kwargs):
    require("aggregate_logpdf", "triton")
    run("triton", dtype, **kwargs)
