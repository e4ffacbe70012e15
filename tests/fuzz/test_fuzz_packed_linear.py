"""packed_linear on random shapes, layouts and scales, against fp64 (make fuzz)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmvae_fast.kernels.packed_linear import (
    pack_gated,
    pack_weight,
    packed_linear,
    packed_linear_int8,
    quantize_gated,
    quantize_weight,
)
from lmvae_fast.kernels.packed_linear.reference import ACTIVATIONS
from tests.kernels.common import LAYOUTS, lay_out, on_backend, require

pytestmark = pytest.mark.fuzz


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(0, 140),
    inputs=st.one_of(st.integers(1, 400), st.integers(1, 12).map(lambda steps: 32 * steps)),  # the latter on AMX tiles
    outputs=st.integers(1, 150),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from(ACTIVATIONS),
    scale=st.sampled_from([1e-10, 1e-3, 1.0, 1e6]),
    biased=st.booleans(),
    added=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_cpp(rows, inputs, outputs, layout, activation, scale, biased, added, seed):
    require("packed_linear", "cpp")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    gated = activation == "swiglu"
    x, weights = lay_out(scale * draw(rows, inputs), layout), [draw(outputs, inputs) for _ in range(1 + gated)]
    bias = draw(outputs) if biased and not gated else None
    residual = draw(rows, outputs) if added else None
    packed = (pack_gated if gated else pack_weight)(*weights)
    options = {"out_features": outputs, "activation": activation, "residual": residual}
    ours = on_backend(packed_linear, "cpp")(x, packed, bias, **options).double()
    plain = on_backend(packed_linear, "reference")
    double = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    truth = plain(x.double(), packed.double(), None if bias is None else bias.double(), **double)
    # what rounding can do to a sum of this many terms, through a function that no more than squares it
    size = sum(((x.double().abs() @ w.double().abs().t()) + 1) for w in weights) / len(weights)
    bound = (size.square() if gated else size) + (0 if residual is None else residual.double().abs())
    if bias is not None:
        bound = bound + bias.double().abs()
    assert ((ours - truth).abs() <= 2e-7 * (8 + inputs**0.5) * bound).all()


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(0, 140),
    inputs=st.integers(1, 600),
    outputs=st.integers(1, 150),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from(ACTIVATIONS),
    scale=st.sampled_from([1e-10, 1e-3, 1.0, 1e6]),
    biased=st.booleans(),
    added=st.booleans(),
    int8=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_cpp_in_bf16(rows, inputs, outputs, layout, activation, scale, biased, added, int8, seed):
    require("packed_linear", "cpp")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    gated = activation == "swiglu"
    x, weights = lay_out(scale * draw(rows, inputs), layout), [draw(outputs, inputs) for _ in range(1 + gated)]
    bias = draw(outputs) if biased and not gated else None
    residual = draw(rows, outputs) if added else None
    options = {"out_features": outputs, "activation": activation}
    double = [None if t is None else t.double() for t in (x, bias, residual)]
    if int8:
        op, packed = packed_linear_int8, (quantize_gated if gated else quantize_weight)(*weights)
        wide = packed
    else:
        op, packed = packed_linear, (pack_gated if gated else pack_weight)(*weights)
        wide = (pack_gated if gated else pack_weight)(*(w.double() for w in weights))
    ours = on_backend(op, "cpp")(x, packed, bias, residual=residual, **options).double()
    truth = on_backend(op, "reference")(double[0], wide, double[1], residual=double[2], **options)
    # one rounding to bf16, and what fp32 sums (and rows of whole numbers, in 2^-16 of their largest) may add to it
    size = sum((double[0].abs() @ w.double().abs().t()) + 1 for w in weights) / len(weights)
    if int8 and rows:
        size = size + 8 * double[0].abs().amax(1, keepdim=True) * inputs**0.5
    bound = (size.square() if gated else size) + (0 if bias is None else double[1].abs())
    assert ((ours - truth).abs() <= 2.0**-8 * truth.abs() + 3e-5 * bound).all()
