"""greedy_head on random shapes, layouts and spreads of logits, against fp64 (make fuzz)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmvae_fast.kernels.greedy_head import greedy_head, pack_head
from tests.kernels.common import LAYOUTS, lay_out, on_backend, require
from tests.kernels.test_greedy_head import assert_argmax

pytestmark = pytest.mark.fuzz


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 300),
    vocabulary=st.integers(1, 1500),
    layout=st.sampled_from(LAYOUTS),
    common=st.sampled_from([0.0, 0.0, 1.0, 100.0]),  # of all entries: nearly equal logits, positive or negative
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e10]),
    uneven=st.booleans(),
    repeated=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_cpp(rows, inputs, vocabulary, layout, common, scale, uneven, repeated, seed):
    require("greedy_head", "cpp")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, inputs, generator=generator)
    weight += common * torch.randn(inputs, generator=generator)
    if uneven:
        weight *= 10 ** (3 * torch.randn(vocabulary, 1, generator=generator))
    if repeated:
        weight = weight[torch.randint(0, vocabulary, (vocabulary,), generator=generator)]
    hidden = lay_out(scale * torch.randn(rows, inputs, generator=generator), layout)
    ids = on_backend(greedy_head, "cpp")(hidden, pack_head(weight))
    assert_argmax(ids, hidden, weight)
    if repeated:  # of equal entries the first
        assert not (weight.unsqueeze(0) == weight[ids].unsqueeze(1)).all(-1).float().argmax(1).ne(ids).any()
