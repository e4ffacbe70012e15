"""row_product on random shapes, layouts and parts, interpreted, against fp64 (make fuzz)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmvae_fast.kernels.row_product import row_product
from tests.kernels.common import LAYOUTS, lay_out, on_backend, require
from tests.kernels.test_row_product import ACTIVATIONS, NORMS, held, make

pytestmark = pytest.mark.fuzz


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
    held(on_backend(row_product, "triton")(*arguments, **options), arguments, options)
