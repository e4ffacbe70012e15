"""posterior_sample's Triton kernels on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels import philox
from lmvae_fast.kernels.backend import choose
from lmvae_fast.kernels.posterior import posterior_sample
from lmvae_fast.kernels.posterior.op import KL_MODES
from tests.kernels.common import (
    LAYOUTS,
    ODD_SIZES,
    GuardedAllocations,
    assert_deterministic,
    assert_fullgraph_equal,
    assert_op_within_error_rule,
)
from tests.kernels.test_posterior import inputs, plain

from .common import (
    DTYPES,
    SEED,
    assert_no_host_sync,
    assert_replays,
    assert_same_far_apart,
    capture,
    cuda,
    no_host_sync,
    triton,
)

pytestmark = pytest.mark.gpu
op = triton(posterior_sample)


def check(arguments, **kwargs):
    assert_op_within_error_rule(op, plain, arguments, ("z", "kl"), ("mu", "logvar"), seed=SEED, **kwargs)


def test_triton_is_what_a_cuda_tensor_gets():
    for dtype in DTYPES:
        assert choose("posterior_sample", torch.zeros(1, device="cuda", dtype=dtype)) == "triton"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [*ODD_SIZES, 1024, 1500])
def test_error_rule_at_odd_sizes(dtype, dim):
    check(cuda(inputs(5, dim, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kl", KL_MODES)
def test_error_rule_in_every_kl_mode(dtype, kl):
    target = 20.0 if kl == "sample_threshold" else 0.3
    check(cuda(inputs(700, 33, dtype)), kl=kl, kl_target=target, num_samples=3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(layout, dtype):
    check(cuda(inputs(6, 37, dtype), layout), num_samples=2)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_empty_batch(shape):
    mu = torch.zeros(shape, device="cuda", requires_grad=True)
    z, kl = op(mu, mu, seed=SEED)
    assert z.shape == shape and kl.shape == shape[:-1]
    (z.sum() + kl.sum()).backward()
    assert mu.grad.shape == shape


def test_noise_is_the_cpus():
    zeros = torch.zeros(513, 130)
    ours = op(zeros.cuda(), zeros.cuda(), seed=SEED)[0]
    torch.testing.assert_close(
        ours.cpu(), philox.normal(philox.seed_tensor(SEED, "cpu"), (513, 130)), rtol=5e-7, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_values_inf_and_nan(dtype):
    inf, nan = float("inf"), float("nan")
    mu = torch.tensor([[1e4, -1e4, 0.0], [3e3, 0.0, 0.0], [inf, 0.0, 1.0], [nan, 0.0, 1.0], [0.0, 0.0, 1.0]])
    logvar = torch.tensor([[30.0, -30.0, 30.0], [0.0, -30.0, 1.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [nan, -inf, 0.0]])
    check(cuda([mu.to(dtype), logvar.to(dtype)]))


def test_small_writes_stay_inside_their_buffers():
    for dtype in (torch.float32, torch.bfloat16):
        for dim in (1, 5, 130, 1500):
            arguments = [x.requires_grad_() for x in cuda(inputs(7, dim, dtype))]
            with GuardedAllocations() as guards:
                z, kl = op(*arguments, seed=SEED, num_samples=2)
                (z.float().sum() + kl.sum()).backward()
            guards.check()


def test_same_bits_run_to_run():
    assert_deterministic(op, cuda(inputs(700, 65)), seed=SEED)


@pytest.mark.parametrize("seed", [None, SEED])
def test_no_host_synchronisation(seed):
    assert_no_host_sync(op, cuda(inputs(64, 33)), seed=seed, kl="sample_threshold", kl_target=2.0)


def test_fullgraph_compile_gives_the_same():
    seed = torch.tensor([3, 4], device="cuda")
    assert_fullgraph_equal(posterior_sample, cuda(inputs(5, 6)), compiler="inductor", seed=seed, kl="free_bits")


def test_graph_replays_on_new_values():
    assert_replays(op, cuda(inputs(33, 20)), seed=torch.tensor([3, 4], device="cuda"))


def test_each_replay_of_a_graph_draws_fresh_noise():
    """From torch's generator; and from a seed tensor, whenever its content is changed on the device."""
    zeros = torch.zeros(64, 32, device="cuda")
    graph, (z, _) = capture(lambda: op(zeros, zeros, seed=None))
    draws = []
    for _ in range(3):
        graph.replay()
        draws.append(z.clone())
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])
    pooled = torch.cat(draws)
    assert abs(pooled.mean().item()) < 0.06 and abs(pooled.std().item() - 1) < 0.06  # 6144 normals: 4 standard errors

    seed = torch.tensor([5, 0], device="cuda")
    graph, (z, _) = capture(lambda: op(zeros, zeros, seed=seed))
    with no_host_sync():
        graph.replay()
        first = z.clone()
        graph.replay()
        second = z.clone()
        seed[1:].add_(1)
        graph.replay()
    assert torch.equal(first, second) and not torch.equal(first, z)
    assert torch.equal(z, op(zeros, zeros, seed=torch.tensor([5, 1], device="cuda"))[0])


def test_large_inputs_far_apart(card):
    assert_same_far_apart(op, cuda(inputs(3, 130, torch.bfloat16)), (0, 1), card, seed=SEED)


def test_large_output(card):
    """z of 3 x 2^20 x 1024 elements: the last rows hold the noise that is theirs."""
    samples, batch, dim = 3, 2**20, 1024
    if card < 12 * 2**30:
        pytest.skip(f"needs 12 GiB of device memory, {card / 2**30:.0f} are free")
    zero = torch.zeros(1, 1, dtype=torch.bfloat16, device="cuda").expand(batch, dim)
    with torch.no_grad():
        z, kl = op(zero, zero, seed=SEED, num_samples=samples)
    assert z.numel() > 2**31
    last = samples * batch - 1
    block = (torch.arange(dim // 4) + last * (dim // 4)).cuda()
    seed = philox.seed_tensor(SEED, "cuda")
    words = philox.block_words(seed[0], seed[1].expand_as(block), block).double().view(-1, 2) // 256
    radius = (-2.0 * ((words[:, 0] + 1.0) * 2.0**-24).log()).sqrt()
    angle = words[:, 1] * (2.0 * torch.pi * 2.0**-24)
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1).flatten()
    torch.testing.assert_close(z[-1, -1].double(), expected, rtol=2**-8, atol=1e-5)
    assert (kl == 0).all()
