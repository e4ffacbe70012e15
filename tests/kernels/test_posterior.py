"""posterior_sample against its reference: values, gradients, layouts, modes, bad input, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels import philox
from lmvae_fast.kernels.backend import BackendError, backend
from lmvae_fast.kernels.posterior import posterior_sample, reference
from lmvae_fast.kernels.posterior.op import KL_MODES

from .common import (
    LAYOUTS,
    ODD_SIZES,
    GuardedAllocations,
    assert_deterministic,
    assert_fullgraph_equal,
    assert_op_within_error_rule,
    lay_out,
    on_backend,
    opcheck,
    raises_naming,
    require,
)

FAST = ("cpp", "triton")
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
SEED = 0x1234_5678_9ABC_DEF0


def plain(mu, logvar, *, seed, num_samples=1, kl="sum", kl_target=0.0):
    """The reference behind the op's face."""
    pair = philox.seed_tensor(seed, mu.device)
    return reference.posterior_sample(mu, logvar, pair, num_samples, kl, kl_target)


def inputs(batch, dim, dtype=torch.float32, layout="dense", logvar_scale=1.0):
    mu, logvar = torch.randn(batch, dim), torch.randn(batch, dim) * logvar_scale - 0.5
    return [lay_out(x.to(dtype), layout) for x in (mu, logvar)]


def check(name, arguments, **kwargs):
    assert_op_within_error_rule(
        on_backend(posterior_sample, name), plain, arguments, ("z", "kl"), ("mu", "logvar"), seed=SEED, **kwargs
    )


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("dim", ODD_SIZES)
def test_error_rule_at_odd_sizes(name, dtype, dim):
    require("posterior_sample", name, dtype)
    check(name, inputs(5, dim, dtype))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("kl", KL_MODES)
@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_error_rule_in_every_kl_mode(name, kl, num_samples, dtype):
    require("posterior_sample", name, dtype)
    # 17 KL values around 20 nats, and per-dimension ones around 0.3: both sides of each threshold occur
    target = 20.0 if kl == "sample_threshold" else 0.3
    check(name, inputs(17, 33, dtype), kl=kl, kl_target=target, num_samples=num_samples)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(name, layout, dtype):
    require("posterior_sample", name, dtype)
    check(name, inputs(6, 37, dtype, layout), num_samples=2)
