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


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (1, 1), (8,), (2, 3, 5), (1, 1500)])
def test_leading_dimensions_and_empty_batches(name, shape):
    # (1, 1500): a row longer than one tile; (8,): no batch dimension at all
    require("posterior_sample", name)
    mu, logvar = torch.randn(shape), torch.randn(shape)
    with backend(name):
        z, kl = posterior_sample(mu, logvar, seed=SEED, num_samples=2)
    flat = [x.reshape(-1, shape[-1]) for x in (mu, logvar)]
    truth_z, truth_kl = plain(*flat, seed=SEED, num_samples=2)
    assert z.shape == (2, *shape)
    assert kl.shape == shape[:-1]
    torch.testing.assert_close(z, truth_z.reshape(z.shape), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kl, truth_kl.reshape(kl.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_magnitudes(name, dtype):
    require("posterior_sample", name, dtype)
    mu = torch.tensor([[1e4, -1e4, 0.0, 1.0, 3e3, -2.0, 0.0]]).repeat(3, 1).to(dtype)
    logvar = torch.tensor([[30.0, -30.0, 30.0, -30.0, 0.0, 10.0, -10.0]]).repeat(3, 1).to(dtype)
    check(name, [mu, logvar])


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("kl", KL_MODES)
def test_inf_and_nan_pass_through_as_in_torch(name, kl):
    require("posterior_sample", name)
    inf, nan = float("inf"), float("nan")
    values = [0.0, 1.0, inf, -inf, nan]
    mu, logvar = (g.reshape(-1, 1) for g in torch.meshgrid(torch.tensor(values), torch.tensor(values), indexing="ij"))
    # one row per combination, so that a NaN of one does not hide another; 200 is above exp's range, -200 below
    mu = torch.cat([mu, torch.tensor([[0.5], [0.5]])])
    logvar = torch.cat([logvar, torch.tensor([[200.0], [-200.0]])])
    results = []
    for function in (on_backend(posterior_sample, name), plain):
        m, lv = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
        z, k = function(m, lv, seed=SEED, kl=kl, kl_target=0.25)
        results.append((z, k, *torch.autograd.grad((z.sum(), k.sum()), (m, lv))))
    for label, out, expected in zip(("z", "kl", "dmu", "dlogvar"), *results, strict=True):
        torch.testing.assert_close(
            out, expected, equal_nan=True, rtol=1e-5, atol=1e-5, msg=lambda m, n=label: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ["reference", "cpp"])
@pytest.mark.parametrize("kl", KL_MODES)
def test_gradients_in_fp64(name, kl):
    require("posterior_sample", name, torch.float64)
    arguments = [x.double().requires_grad_() for x in inputs(4, 5)]
    with backend(name):
        assert torch.autograd.gradcheck(
            lambda m, lv: posterior_sample(m, lv, seed=SEED, num_samples=2, kl=kl, kl_target=0.3), arguments
        )


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("output", [0, 1])
def test_one_output_alone_may_be_used(name, output):
    require("posterior_sample", name)
    grads = []
    for function in (on_backend(posterior_sample, name), plain):
        arguments = [x.detach().clone().requires_grad_() for x in (torch.ones(4, 9), torch.full((4, 9), 0.3))]
        grads.append(torch.autograd.grad(function(*arguments, seed=SEED)[output].sum(), arguments))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAST)
def test_one_input_alone_may_need_a_gradient(name):
    require("posterior_sample", name)
    mu, logvar = inputs(4, 9)
    mu.requires_grad_()
    with backend(name):
        z, kl = posterior_sample(mu, logvar, seed=SEED)
        (z.sum() + kl.sum()).backward()
    torch.testing.assert_close(mu.grad, 1 + mu.detach())


def test_backends_draw_the_same_noise():
    """All of them give reference's z to the last bits of the normals, whichever is chosen."""
    mu, logvar = torch.zeros(33, 130), torch.zeros(33, 130)
    expected = plain(mu, logvar, seed=SEED)[0]
    for name in FAST:
        require("posterior_sample", name)
        with backend(name):
            torch.testing.assert_close(posterior_sample(mu, logvar, seed=SEED)[0], expected, rtol=5e-7, atol=1e-9)


def test_manual_seed_governs_and_calls_differ():
    mu, logvar = inputs(4, 8)
    torch.manual_seed(5)
    first, second = posterior_sample(mu, logvar, seed=None)[0], posterior_sample(mu, logvar, seed=None)[0]
    torch.manual_seed(5)
    assert torch.equal(first, posterior_sample(mu, logvar, seed=None)[0])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", FAST)
def test_nothing_is_written_outside_the_outputs(name):
    require("posterior_sample", name)
    for dim in (1, 5, 130):
        arguments = [x.requires_grad_() for x in inputs(7, dim)]
        with GuardedAllocations() as guards, backend(name):
            z, kl = posterior_sample(*arguments, seed=SEED, num_samples=2)
            (z.sum() + kl.sum()).backward()
        guards.check()


def test_same_bits_run_to_run_and_for_any_number_of_threads():
    require("posterior_sample", "cpp")
    assert_deterministic(on_backend(posterior_sample, "cpp"), inputs(700, 65), seed=SEED)


@pytest.mark.parametrize("choice", FAST)
def test_opcheck(choice):
    require("posterior_sample", choice)
    mu, logvar = (x.requires_grad_() for x in inputs(3, 6))
    seed = torch.tensor([1, 2])
    opcheck("posterior_fwd", (mu, logvar, seed, 1, 0, 0.0), choice)
    opcheck("posterior_fwd", (mu, logvar, seed, 2, 2, 0.5), choice)
    z, kl = torch.randn(3, 6), torch.randn(3)
    opcheck("posterior_bwd", (z, None, mu.detach(), logvar.detach(), kl, seed, 1, 3, 0.5), choice)


@pytest.mark.parametrize("name", ["cpp", "triton", "reference"])
def test_fullgraph_compile_gives_the_same(name):
    require("posterior_sample", name)
    assert_fullgraph_equal(
        on_backend(posterior_sample, "auto"), inputs(5, 6), seed=torch.tensor([3, 4]), kl="free_bits"
    )
    with backend(name):
        assert_fullgraph_equal(posterior_sample, inputs(5, 6), seed=torch.tensor([3, 4]), num_samples=2)


def test_autocast_keeps_the_input_dtype():
    mu, logvar = inputs(3, 8, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        z, kl = posterior_sample(mu, logvar, seed=SEED)
    assert (z.dtype, kl.dtype) == (torch.bfloat16, torch.float32)


def test_vmap_is_refused():
    mu, logvar = inputs(3, 8)
    with raises_naming(TypeError, "posterior_sample", "vmap"):
        torch.func.vmap(lambda m: posterior_sample(m, logvar[0], seed=SEED))(mu)


def test_bad_input_is_named():
    mu, logvar = inputs(3, 8)
    with raises_naming(ValueError, "mu", "[3, 8]", "logvar", "[3, 7]"):
        posterior_sample(mu, logvar[:, :7], seed=None)
    with raises_naming(TypeError, "mu", "float32", "logvar", "float64"):
        posterior_sample(mu, logvar.double(), seed=None)
    with raises_naming(TypeError, "int64"):
        posterior_sample(mu.long(), logvar.long(), seed=None)
    with raises_naming(ValueError, "mu", "[3, 0]"):
        posterior_sample(mu[:, :0], logvar[:, :0], seed=None)
    with raises_naming(ValueError, "num_samples=0"):
        posterior_sample(mu, logvar, seed=None, num_samples=0)
    with raises_naming(ValueError, "kl='mean'", "free_bits"):
        posterior_sample(mu, logvar, seed=None, kl="mean")
    for bad in (-1.0, float("nan"), float("inf")):
        with raises_naming(ValueError, "kl_target"):
            posterior_sample(mu, logvar, seed=None, kl_target=bad)
    with raises_naming(ValueError, "mu is on cpu", "meta"):
        posterior_sample(mu, logvar.to("meta"), seed=None)


def test_a_forced_backend_that_cannot_run_is_an_error():
    with backend("triton"), raises_naming(BackendError, "posterior_sample", "float64"):
        posterior_sample(torch.zeros(2, 4).double(), torch.zeros(2, 4).double(), seed=None)
