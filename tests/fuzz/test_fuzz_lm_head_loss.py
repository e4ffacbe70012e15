"""lm_head_loss on random shapes, layouts, dtypes and options, against full logits (make fuzz)."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmvae_fast.kernels.lm_head_loss import lm_head_loss, reference
from tests.kernels.common import LAYOUTS, assert_op_within_error_rule, lay_out, on_backend, require, run_with_grads
from tests.kernels.test_lm_head_loss import call, inputs

pytestmark = pytest.mark.fuzz
NAMES = ("hidden", "weight", "bias", "token_weights")


def plain(hidden, weight, *rest, **kwargs):
    """Full logits. Dense, as torch's own bf16 product on CPU gives NaN where NaN lies in the gaps between rows."""
    return call(reference.lm_head_loss)(hidden.contiguous(), weight.contiguous(), *rest, **kwargs)


def run(name, tokens, width, vocab, dtype, layouts, ignored, scale, softcap, logit_scale, chunk, data_seed):
    torch.manual_seed(data_seed)
    hidden, weight, bias, token_weights, labels = inputs(tokens, width, vocab, dtype, scale, ignored=False)
    labels[torch.rand(tokens) < ignored] = -100
    # Not "expanded" for the weight: gradients of equal rows are nothing but rounding.
    arguments = [
        lay_out(hidden, layouts[0]),
        lay_out(weight, "offset" if layouts[1] == "expanded" else layouts[1]),
        bias,
        token_weights,
        labels,
    ]
    options = {"softcap": softcap, "logit_scale": logit_scale}
    function = on_backend(call(functools.partial(lm_head_loss, chunk=chunk)), name)
    if tokens >= 16 and width >= 16 and vocab >= 16 and ignored < 1.0 and layouts[0] != "expanded":
        assert_op_within_error_rule(function, plain, arguments, ("loss", "nll"), NAMES, **options)
        return
    # The rule compares the largest of many errors; eager's few can all be tiny by luck. So: roundings of the sums' terms.
    outputs, grads, weights = run_with_grads(function, arguments, **options)
    wide = [x.double() if x.is_floating_point() else x for x in arguments]
    expected, expected_grads, _ = run_with_grads(plain, wide, weights, **options)
    eps = torch.finfo(dtype).eps
    # nll: as torch, off by the rounding of logits (half types: eager rounds them); gradients: of their terms, which are
    # at most the pull on a token (|w| + |weights|, some 5) times an operand.
    size = 1 + max(x.abs().max().item() for x in wide[:3]) + expected[1].abs().max().item()
    for out, truth in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
        terms = size * 5 * (tokens if out.dim() == 0 or out.shape[0] == vocab else 1)
        torch.testing.assert_close(out.double(), truth, rtol=16 * eps, atol=16 * eps * terms)


def options(max_tokens, max_width, max_vocab):
    return {
        "tokens": st.integers(1, max_tokens) | st.integers(16, max_tokens),
        "width": st.integers(1, max_width) | st.integers(16, max_width),
        "vocab": st.integers(1, max_vocab) | st.integers(16, max_vocab),
        "layouts": st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
        "ignored": st.sampled_from([0.0, 0.3, 1.0]),
        "scale": st.sampled_from([0.1, 1.0, 5.0]),
        "softcap": st.sampled_from([None, 2.0, 30.0]),
        "logit_scale": st.sampled_from([1.0, 0.25]),
        "chunk": st.sampled_from([None, 1, 7, 64]),
        "data_seed": st.integers(0, 2**32),
    }


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), **options(80, 90, 1500))
def test_cpp(dtype, **kwargs):
    require("lm_head_loss", "cpp")
    run("cpp", dtype=dtype, **kwargs)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16]), **options(18, 40, 300))
def test_triton(dtype, **kwargs):
    require("lm_head_loss", "triton")
    run("triton", dtype=dtype, **kwargs)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(**options(40, 60, 300))
def test_chunks_in_plain_torch(**kwargs):
    run("reference", dtype=torch.float32, **kwargs)
