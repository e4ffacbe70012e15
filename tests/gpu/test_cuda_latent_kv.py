"""latent_kv's Triton kernels on a CUDA device, and AdamW in the backward pass."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.backend import backend
from lmvae_fast.kernels.latent_kv import LatentKVAdamW, latent_kv, reference
from tests.kernels.common import (
    LAYOUTS,
    GuardedAllocations,
    assert_deterministic,
    assert_fullgraph_equal,
    assert_op_within_error_rule,
    assert_within_error_rule,
)
from tests.kernels.test_latent_kv import SHAPES, inputs, plain

from .common import (
    DTYPES,
    SEED,
    assert_no_host_sync,
    assert_replays,
    assert_same_far_apart,
    capture,
    cuda,
    far_apart,
    no_host_sync,
    triton,
)

pytestmark = pytest.mark.gpu
op = triton(latent_kv)
GPT2 = (12, 32, 12, 33, 64, 128)  # L, B, Hkv, M, D, nz: GPT-2-small


def check(arguments, **kwargs):
    names = ("z", "weight", "bias")[: len(arguments)]
    assert_op_within_error_rule(op, plain, arguments, ("memory",), names, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_rule_at_odd_sizes(dtype, shape):
    check(cuda(inputs(shape, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:5])
def test_dropout_and_its_gradients(dtype, shape):
    check(cuda(inputs(shape, dtype)), dropout=0.3, seed=SEED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_size_of_gpt2(dtype):
    check(cuda(inputs(GPT2, dtype)), dropout=0.1, seed=SEED)


@pytest.mark.parametrize("memory", [torch.float16, torch.bfloat16])
def test_master_weight_with_half_precision_memory(memory):
    check(cuda(inputs((2, 6, 2, 3, 5, 37))), dtype=memory)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(layout, dtype):
    check(cuda(inputs((3, 6, 2, 3, 5, 37), dtype), layout))


def test_dropout_mask_is_the_cpus():
    z, weight, _ = cuda(inputs((2, 4, 2, 5, 8, 16)))
    dropped = op(z, weight, dropout=0.25, seed=torch.tensor([5, 9], device="cuda"))
    assert torch.equal((dropped != 0).cpu(), reference.keep_mask(dropped.shape, 0.25, torch.tensor([5, 9])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_writes_its_slots_and_nothing_else(dtype):
    layers, batch, heads, slots, dim, nz = 2, 5, 3, 4, 80, 16
    z, weight, bias = cuda(inputs((layers, batch, heads, slots, dim, nz), dtype))
    dense = op(z, weight, bias)
    views = {
        "prefix": lambda cache: cache[:, :, :batch, :, :slots],
        "interleaved": lambda cache: cache[:, :, :batch, :, 0 : 2 * slots : 2],
        "rows": lambda cache: cache[:, :, 1 : 2 * batch : 2, :, 3 : 3 + slots],
    }
    for where, view in views.items():
        cache = torch.full((layers, 2, 2 * batch + 1, heads, 2 * slots + 3, dim), 7.0, dtype=dtype, device="cuda")
        expected = cache.clone()
        view(expected).copy_(dense)
        op(z, weight, bias, out=view(cache))
        assert torch.equal(cache, expected), where
    rolling = torch.full((layers, 2, batch, heads, slots + 2, dim), 7.0, dtype=dtype, device="cuda")
    for i in range(slots):
        op(z, weight[:, :, :, i : i + 1], bias[:, :, :, i : i + 1], out=rolling[:, :, :, :, i + 1 : i + 2])
    torch.testing.assert_close(rolling[:, :, :, :, 1:-1], dense)
    assert (rolling[:, :, :, :, [0, -1]] == 7).all()


@pytest.mark.parametrize("shape", [(2, 0, 2, 3, 4, 5), (0, 2, 2, 3, 4, 5), (1, 2, 2, 0, 4, 5)])
def test_empty(shape):
    leaves = [x.requires_grad_() for x in cuda(inputs(shape))]
    memory = op(*leaves, dropout=0.5, seed=1)
    for leaf, grad in zip(leaves, torch.autograd.grad(memory.sum(), leaves), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_extreme_values_inf_and_nan_pass_through():
    z, weight, bias = inputs((1, 9, 2, 3, 5, 37))
    z[0] *= 1e4
    z[1, 3] = float("inf")
    z[2, 4] = float("nan")
    weight[0, 1, 1, 2, 3, 5] = float("-inf")
    bias[0, 0, 1, 2, 3] = float("nan")
    check(cuda([z, weight, bias]))


def test_small_writes_stay_inside_their_buffers():
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES[:6]:
            leaves = [x.requires_grad_() for x in cuda(inputs(shape, dtype))]
            with GuardedAllocations() as guarded:
                memory = op(*leaves, dropout=0.2, seed=1)
                grads = torch.autograd.grad(memory, leaves, torch.ones_like(memory))
            guarded.check()
            assert all(x.isfinite().all() for x in (memory, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_run_to_run(dtype):
    assert_deterministic(op, cuda(inputs((3, 33, 2, 6, 64, 48), dtype)), dropout=0.1, seed=SEED)


@pytest.mark.parametrize("seed", [None, SEED])
def test_no_host_synchronisation(seed):
    assert_no_host_sync(op, cuda(inputs((2, 6, 2, 3, 5, 37))), dropout=0.1, seed=seed)


def test_fullgraph_compile_gives_the_same():
    seed = torch.tensor([1, 2], device="cuda")
    assert_fullgraph_equal(latent_kv, cuda(inputs((2, 6, 2, 3, 5, 37))), compiler="inductor", dropout=0.1, seed=seed)


def test_graph_replays_on_new_values():
    seed = torch.tensor([1, 2], device="cuda")
    assert_replays(op, cuda(inputs((2, 6, 2, 3, 5, 37))), dropout=0.1, seed=seed)


def test_each_replay_of_a_graph_drops_other_elements():
    z, weight, _ = cuda(inputs((2, 8, 2, 5, 8, 16)))
    graph, memory = capture(lambda: op(z, weight, dropout=0.5, seed=None))
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append((memory != 0).clone())
    assert not torch.equal(*masks)
    assert all(0.45 < mask.double().mean().item() < 0.55 for mask in masks)


# ---- AdamW in the backward pass --------------------------------------------------------------------------------------

_OPTIONS = {"lr": 3e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def _fused(weight, data, dropout, max_norm):
    weight = torch.nn.Parameter(weight.clone())
    optimizer, norms = LatentKVAdamW(weight, **_OPTIONS), []
    for step, (z, factor) in enumerate(data):
        memory = optimizer.project(z, dropout=dropout, seed=torch.tensor([step, 0], device="cuda"))
        (memory.sin() * factor).sum().backward()
        norms.append(optimizer.norm_sq().sqrt())
        optimizer.step(clip=torch.clamp(max_norm / (norms[-1] + 1e-6), max=1.0))
    return weight.detach(), torch.stack(norms)


def _plain(weight, data, dropout, max_norm, dtype):
    weight = torch.nn.Parameter(weight.to(dtype))
    optimizer, norms = torch.optim.AdamW([weight], **_OPTIONS), []
    for step, (z, factor) in enumerate(data):
        with backend("reference"):
            seed = torch.tensor([step, 0], device="cuda")
            memory = latent_kv(z.to(dtype), weight, dropout=dropout, seed=seed)
        (memory.sin() * factor.to(dtype)).sum().backward()
        norms.append(torch.nn.utils.clip_grad_norm_([weight], max_norm))
        optimizer.step()
        optimizer.zero_grad()
    return weight.detach(), torch.stack(norms)


@pytest.mark.parametrize("batch", [7, 40])  # rank below nz: Gram matrices; above it: tiles of the gradient
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("max_norm", [1e9, 1.0])
def test_adamw_equals_backward_clip_adamw(batch, dropout, max_norm):
    shape, nz = (2, 2, 2, 3, 16), 19
    weight = torch.randn(*shape, nz, device="cuda") / nz**0.5
    data = [
        (torch.randn(batch, nz, device="cuda"), torch.randn(*shape[:2], batch, *shape[2:], device="cuda"))
        for _ in range(4)
    ]
    with backend("triton"):
        ours, norms = _fused(weight, data, dropout, max_norm)
    eager, eager_norms = _plain(weight, data, dropout, max_norm, torch.float32)
    truth, true_norms = _plain(weight, data, dropout, max_norm, torch.float64)
    assert_within_error_rule("norm", norms, eager_norms, true_norms)
    assert_within_error_rule("weight", ours, eager, truth, factor=3.0)


def test_adamw_step_waits_for_nothing_and_makes_no_gradient_of_the_weights_size():
    layers, batch, heads, slots, dim, nz = 4, 32, 12, 33, 64, 128
    weight = torch.nn.Parameter(torch.randn(layers, 2, heads, slots, dim, nz, device="cuda") * 0.05)
    z = torch.randn(batch, nz, device="cuda")
    optimizer = LatentKVAdamW(weight)
    dmemory = torch.randn(layers, 2, batch, heads, slots, dim, device="cuda")

    def step():
        optimizer.project(z, dropout=0.1, seed=None).backward(dmemory)
        norm = optimizer.norm_sq().sqrt()
        optimizer.step(clip=torch.clamp(1.0 / (norm + 1e-6), max=1.0))

    with backend("triton"):
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with no_host_sync():
            step()
        torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 0.8 * weight.numel() * 4, f"{extra} bytes beside a weight of {weight.numel() * 4}"
    assert weight.grad is None


# ---- addresses past 2^31 ---------------------------------------------------------------------------------------------


def test_large_inputs_far_apart(card):
    assert_same_far_apart(op, cuda(inputs((3, 6, 2, 3, 5, 37), torch.bfloat16)), (1,), card, dropout=0.2, seed=SEED)


def test_large_cache(card):
    """The slots of the last layer lie past 2^31 elements of the cache, and so does the gradient that is read back."""
    z, weight, bias = cuda(inputs((3, 6, 2, 3, 8, 37), torch.bfloat16))
    dense = op(z, weight, bias)
    cache = far_apart(torch.zeros_like(dense), card)
    op(z, weight, bias, out=cache)
    assert torch.equal(cache, dense)
    leaves = [x.requires_grad_() for x in (z, weight, bias)]
    memory = op(*leaves)
    upstream = torch.randn_like(dense)
    plain_grads = torch.autograd.grad(memory, leaves, upstream, retain_graph=True)
    cache.copy_(upstream)
    for ours, expected in zip(torch.autograd.grad(memory, leaves, cache), plain_grads, strict=True):
        assert torch.equal(ours, expected)


def test_large_weight(card):
    """A weight of more than 2^31 elements: its last rows, and their gradient."""
    layers, heads, slots, dim, nz = 2, 64, 33, 128, 2048
    if card < 24 * 2**30:
        pytest.skip(f"needs 24 GiB of device memory, {card / 2**30:.0f} are free")
    weight = torch.randn(layers, 2, heads, slots, dim, nz, dtype=torch.bfloat16, device="cuda").mul_(nz**-0.5)
    assert weight.numel() > 2**31
    weight.requires_grad_()
    z = torch.randn(2, nz, dtype=torch.bfloat16, device="cuda")
    memory = op(z, weight)
    last = weight.detach()[-1, -1, -1, -1]
    torch.testing.assert_close(
        memory.detach()[-1, -1, :, -1, -1].float(), z.float() @ last.float().T, rtol=1e-2, atol=1e-2
    )
    upstream = torch.randn_like(memory)
    (grad,) = torch.autograd.grad(memory, weight, upstream)
    expected = upstream[-1, -1, :, -1, -1].float().T @ z.float()
    torch.testing.assert_close(grad[-1, -1, -1, -1].float(), expected, rtol=1e-2, atol=1e-2)
