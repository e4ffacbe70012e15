"""row_product on random shapes, layouts and parts, interpreted, against fp64 (make fuzz)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmvae_fast.kernels.row_product import row_product
from tests.kernels.common import LAYOUTS, lay_out, on_backend, require
from tests.kernels.test_row_product import ACTIVATIONS, NORMS, make, plain

pytestmark = pytest.mark.fuzz


def assert_near(out, arguments, options):
    """Within sixteen roundings of the terms: of few numbers torch may be off by nothing, and a GELU far below 0 is a difference
    of numbers of the size of what goes in."""
    x, weight, bias = (None if each is None else each.double() for each in arguments)
    truth = plain(x, weight, bias, **options)
    rows = x
    if (norm := options.get("norm")) is not None:
        rows = plain(x, torch.eye(x.shape[1]).double(), norm=norm)
        rows = rows.abs() + norm.weight.abs() + (0.0 if norm.bias is None else norm.bias.abs())
    sizes = rows.abs() @ weight.abs().t() + (0.0 if bias is None else bias.abs())
    if options["activation"] in ("swiglu", "geglu_tanh"):
        gate, up = sizes.chunk(2, dim=1)
        sizes = gate * up
    if options["added"] is not None:
        sizes = sizes + options["added"].abs()
    assert ((out - truth).abs() <= 16 * 2.0**-24 * sizes + 1e-30).all()


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 60),
    norm=st.sampled_from(NORMS),
    activation=st.sampled_from(ACTIVATIONS),
    layout=st.sampled_from(LAYOUTS),
    added=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_triton(rows, inputs, outputs, norm, activation, layout, added, bias, seed):
    require("row_product", "triton")
    torch.manual_seed(seed)
    (x, weight, offset), options = make(
        rows, inputs, 2 * outputs, norm=norm, activation=activation, added=added, bias=bias
    )
    arguments = lay_out(x, layout), lay_out(weight, layout), offset
    assert_near(on_backend(row_product, "triton")(*arguments, **options), arguments, options)
