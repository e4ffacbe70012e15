"""packed_linear on random shapes, layouts and scales, against fp64 (make fuzz)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmvae_fast.kernels.packed_linear import pack_gated, pack_weight, packed_linear
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
