"""sample_token on random shapes, layouts, dtypes and options, against its reference (make fuzz)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.common import LAYOUTS, lay_out, require
from tests.kernels.test_sample_token import same

pytestmark = pytest.mark.fuzz


def run(name, batch, vocab, dtype, layout, scale, levels, forbidden, data_seed, penalty, **options):
    generator = torch.Generator().manual_seed(data_seed)
    logits = scale * torch.randn(batch, vocab, generator=generator)
    if levels:  # few distinct values: ties at every cut
        logits = (logits * levels / scale).round() * (scale / levels)
    logits[torch.rand(batch, vocab, generator=generator) < forbidden] = -float("inf")
    seen = None if penalty == 1.0 else torch.rand(batch, vocab, generator=generator) < 0.3
    rows, steps = torch.randint(0, 2**40, (2, batch), generator=generator)
    same(
        name, lay_out(logits.to(dtype), layout), rows=rows, steps=steps, seen=seen, repetition_penalty=penalty, **options
    )  # fmt: skip


def options(max_batch, max_vocab):
    return {
        "batch": st.integers(1, max_batch),
        "vocab": st.integers(1, max_vocab),
        "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        "layout": st.sampled_from(LAYOUTS),
        "scale": st.sampled_from([1e-3, 1.0, 5.0, 50.0]),
        "levels": st.sampled_from([0, 0, 1, 3]),
        "forbidden": st.sampled_from([0.0, 0.0, 0.5, 1.0]),
        "data_seed": st.integers(0, 2**32),
        "penalty": st.sampled_from([1.0, 1.0, 0.7, 1.3]),
        "greedy": st.booleans(),
        "temperature": st.sampled_from([0.1, 0.7, 1.0, 1.9]),
        "top_k": st.just(0) | st.integers(1, max_vocab + 5),
        "top_p": st.just(1.0) | st.floats(1e-6, 1.0),
        "min_p": st.just(0.0) | st.floats(0.0, 1.0),
        "seed": st.integers(0, 2**64 - 1),
    }


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(**options(12, 3000))
def test_cpp(**kwargs):
    require("sample_token", "cpp")
    run("cpp", **kwargs)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(**options(2, 300))
def test_triton(**kwargs):
    require("sample_token", "triton")
    run("triton", **kwargs)
