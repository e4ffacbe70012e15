"""frozen_layer on random shapes, layouts and sizes of numbers, against its reference in fp64 (make fuzz)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmvae_fast.kernels import frozen_layer
from lmvae_fast.kernels.frozen_layer import reference
from tests.kernels.common import GRAD_FACTOR, LAYOUTS, RMS_RATIO, assert_within_error_rule, lay_out, on_backend, require

pytestmark = pytest.mark.fuzz


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 40),
    width=st.integers(2, 700),
    layout=st.sampled_from([layout for layout in LAYOUTS if layout != "expanded"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    centred=st.booleans(),
    kind=st.sampled_from(reference.ACTIVATIONS),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 2**32),
)
def test_cpp(rows, width, layout, dtype, centred, kind, scale, seed):
    require("frozen_layer", "cpp")
    generator = torch.Generator().manual_seed(seed)
    rows = max(rows, -(-256 // width))  # of few numbers plain torch's largest error is now and then a lucky one

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    x, grad, weight = lay_out(scale * draw(rows, width), layout), lay_out(draw(rows, width), layout), draw(width)
    y, stats = on_backend(frozen_layer.norm, "cpp")(x, weight, eps=1e-5, centred=centred)
    truth, exact = reference.norm(x.double(), weight.double(), None, 1e-5, centred)
    plain, own_stats = reference.norm(x, weight, None, 1e-5, centred)
    assert_within_error_rule("norm", y, plain, truth)
    out = on_backend(frozen_layer.norm_gradient, "cpp")(grad, x, stats, weight, centred=centred)
    plain = reference.norm_gradient(grad, x, own_stats, weight, None, centred)
    truth = reference.norm_gradient(grad.double(), x.double(), exact, weight.double(), None, centred)
    # Of few columns that are centred the gradient is a small difference of large terms: plain torch's own error is the measure.
    own = ((plain.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt().clamp(min=1e-300)).item()
    ratio = max(RMS_RATIO, GRAD_FACTOR * own)
    assert_within_error_rule("norm's gradient", out, plain, truth, GRAD_FACTOR, ratio)

    both = lay_out(scale * draw(rows, (1 + (kind in reference.GATED)) * width), layout)
    out = on_backend(frozen_layer.activation, "cpp")(both, kind)
    assert_within_error_rule(kind, out, reference.activation(both, kind), reference.activation(both.double(), kind))
    out = on_backend(frozen_layer.activation_gradient, "cpp")(grad, both, kind)
    plain, truth = (
        reference.activation_gradient(g, x, kind) for g, x in ((grad, both), (grad.double(), both.double()))
    )
    assert_within_error_rule(f"{kind}'s gradient", out, plain, truth, GRAD_FACTOR)
