"""AdamW in the backward pass of latent_kv against backward + clip_grad_norm_ + torch.optim.AdamW."""

from __future__ import annotations

import copy

import pytest
import torch

from lmvae_fast.kernels.backend import backend
from lmvae_fast.kernels.latent_kv import LatentKVAdamW, latent_kv, latent_kv_adamw, latent_kv_norm, reference

from .common import GuardedAllocations, assert_within_error_rule, opcheck, require

BACKENDS = ["reference", "cpp", "triton"]
FAST = ["cpp", "triton"]
SHAPE = (2, 2, 2, 3, 5)  # L, 2, Hkv, M, D
NZ = 19
# eps is of the gradient's own size: with a small one a step is nearly the gradient's sign, and where an element of it is
# close to 0 plain torch itself is off by anything up to lr, which says nothing about either of the two that are compared.
OPTIONS = {"lr": 5e-2, "betas": (0.8, 0.99), "eps": 1.0, "weight_decay": 0.1}


def make_weight(dtype=torch.float32, nz=NZ):
    return torch.nn.Parameter((torch.randn(*SHAPE, nz) / nz**0.5).to(dtype))


def batches(steps, micro, batch, dtype=torch.float32, nz=NZ):
    """For each step its micro-batches of (z, what the memory is multiplied with)."""
    return [
        [(torch.randn(batch, nz).to(dtype), torch.randn(*SHAPE[:2], batch, *SHAPE[2:]).to(dtype)) for _ in range(micro)]
        for _ in range(steps)
    ]


def loss_of(memory, factor):
    return (memory.to(factor.dtype).sin() * factor).sum()


def linear_loss(memory, factor):
    """Its gradient is `factor` without rounding: what is left to compare is the optimizer."""
    return (memory * factor.to(memory.dtype)).sum()


def torch_training(weight, bias, data, max_norm, dropout, wide, loss=loss_of):
    """The plain way: a gradient of the weight's size, clip_grad_norm_, torch.optim.AdamW. Returns weight and norms."""
    weight, bias = (torch.nn.Parameter(x.detach().to(wide, copy=True)) for x in (weight, bias))
    optimizer = torch.optim.AdamW([weight, bias], **OPTIONS)
    norms = []
    for step, micro in enumerate(data):
        for i, (z, factor) in enumerate(micro):
            seed = torch.tensor([step, i])
            with backend("reference"):
                memory = latent_kv(z.to(wide), weight, bias, dropout=dropout, seed=seed)
            loss(memory, factor.to(wide)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_([weight, bias], max_norm))
        optimizer.step()
        optimizer.zero_grad()
    return weight.detach(), torch.stack(norms)


def fused_training(weight, bias, data, max_norm, dropout, loss=loss_of):
    weight, bias = (torch.nn.Parameter(x.detach().clone()) for x in (weight, bias))
    optimizer, rest = LatentKVAdamW(weight, **OPTIONS), torch.optim.AdamW([bias], **OPTIONS)
    norms = []
    for step, micro in enumerate(data):
        for i, (z, factor) in enumerate(micro):
            memory = optimizer.project(z, bias, dropout=dropout, seed=torch.tensor([step, i]))
            loss(memory, factor).backward()
        norms.append((optimizer.norm_sq() + bias.grad.square().sum()).sqrt())
        clip = torch.clamp(max_norm / (norms[-1] + 1e-6), max=1.0)
        bias.grad.mul_(clip)
        rest.step()
        rest.zero_grad()
        optimizer.step(clip=clip)
        assert weight.grad is None
        assert optimizer.rank == 0
    return weight.detach(), torch.stack(norms)


# (micro-batches, batch of each): rank below nz; of several micro-batches; above nz, where the norm takes the other way
BATCHES = [(1, 7), (3, 2), (2, 13)]
# max_norm never clips, always clips. Triton's interpreter takes seconds for a mask, so there dropout comes once.
TRAININGS = [
    (name, max_norm, *sizes, dropout)
    for name in BACKENDS
    for max_norm in (1e9, 5.0)
    for sizes in BATCHES
    for dropout in (0.0, 0.3)
    if name != "triton" or dropout == 0.0 or (max_norm, sizes) == (5.0, (3, 2))
]


@pytest.mark.parametrize(("name", "max_norm", "micro", "batch", "dropout"), TRAININGS)
def test_equals_backward_clip_adamw(name, max_norm, micro, batch, dropout):
    require("latent_kv", name)
    weight, bias, data = make_weight(), torch.randn(SHAPE), batches(2 if name == "triton" else 4, micro, batch)
    with backend(name):
        ours, norms = fused_training(weight, bias, data, max_norm, dropout)
    eager, eager_norms = torch_training(weight, bias, data, max_norm, dropout, torch.float32)
    truth, true_norms = torch_training(weight, bias, data, max_norm, dropout, torch.float64)
    assert_within_error_rule("norm", norms, eager_norms, true_norms)
    assert_within_error_rule("weight", ours, eager, truth, factor=3.0)
    assert (ours - weight.detach()).abs().max() > 0.02, "the steps must have moved the weight"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("batch", [5, 23])  # below nz and above: the norm's two ways
def test_parts_of_a_batch_are_the_whole(name, batch):
    """Factors of two processes' sentences, as `exchange` brings them together, against one process's."""
    require("latent_kv", name)
    z, factor = torch.randn(batch, NZ), torch.randn(*SHAPE[:2], batch, *SHAPE[2:])
    initial, found = make_weight(), []
    for world in (1, 2):
        optimizer = LatentKVAdamW(torch.nn.Parameter(initial.detach().clone()), **OPTIONS)
        with backend(name):
            for rank in range(world):
                stream = torch.tensor([3, 4, rank, world, batch])
                memory = optimizer.project(z[rank::world], dropout=0.3, seed=stream)
                linear_loss(memory, factor[:, :, rank::world]).backward()
            found.append(optimizer.norm_sq())
            optimizer.step()
        found.append(optimizer.weight)
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], found[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_fp32_moments(name, dtype):
    require("latent_kv", name, dtype)
    weight, bias, data = make_weight(dtype), torch.randn(SHAPE).to(dtype), batches(2, 1, 6, dtype)
    with backend(name):
        ours, _ = fused_training(weight, bias, data, 1e9, 0.0, linear_loss)
    truth, _ = torch_training(weight, bias, data, 1e9, 0.0, torch.float64, linear_loss)
    eager, _ = torch_training(weight, bias, data, 1e9, 0.0, dtype, linear_loss)
    assert_within_error_rule("weight", ours, eager, truth, factor=3.0)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_one_step_against_the_reference_with_any_moments(name, moments, weight_dtype):
    require("latent_kv", name, weight_dtype)
    z, grad = torch.randn(5, 37).to(weight_dtype), torch.randn(2, 2, 5, 3, 2, 33).bfloat16()
    first = [torch.randn(2, 2, 3, 2, 33, 37).to(weight_dtype), torch.randn(2, 2, 3, 2, 33, 37).to(moments)]
    first.append(torch.rand(2, 2, 3, 2, 33, 37).to(moments))
    scalars = {"step": torch.tensor(3.0), "lr": torch.tensor(0.01), "clip": torch.tensor(0.5)}
    results = {}
    for backend_name in (name, "reference"):
        state = [x.clone() for x in first]
        with backend(backend_name):
            latent_kv_adamw(*state, [grad], [z], **scalars)
        results[backend_name] = state
    wide = [x.double() for x in first]
    dw = reference.weight_gradient(wide[0], [grad], [z], 0.0, [])
    reference.adamw(*wide, dw * 0.5, scalars["step"], scalars["lr"], 0.9, 0.999, 1e-8, 1e-2)
    for label, ours, eager, truth in zip("wmv", results[name], results["reference"], wide, strict=True):
        assert_within_error_rule(label, ours, eager, truth, factor=3.0)


@pytest.mark.parametrize("name", FAST)
def test_strided_slots_are_updated_in_place_and_nothing_else(name):
    require("latent_kv", name)
    full = [torch.rand(2, 2, 3, 4, 5, 7) for _ in range(3)]
    before = [x.clone() for x in full]
    z, grad = torch.randn(5, 7), torch.randn(2, 2, 5, 3, 1, 5)
    scalars = {"step": torch.tensor(1.0), "lr": torch.tensor(0.1), "clip": torch.tensor(1.0)}
    with backend(name):
        latent_kv_adamw(*(x[:, :, :, 2:3] for x in full), [grad], [z], **scalars)
    want = [x[:, :, :, 2:3].clone() for x in before]
    with backend("reference"):
        latent_kv_adamw(*want, [grad], [z], **scalars)
    for x, old, new in zip(full, before, want, strict=True):
        torch.testing.assert_close(x[:, :, :, 2:3], new)
        assert torch.equal(x[:, :, :, [0, 1, 3]], old[:, :, :, [0, 1, 3]])


@pytest.mark.parametrize("name", FAST)
def test_nothing_of_the_weights_size_is_allocated(name):
    require("latent_kv", name)
    nz, batch = 64, 4
    weight = make_weight(nz=nz)
    optimizer = LatentKVAdamW(weight, **OPTIONS)
    z = torch.randn(batch, nz, requires_grad=True)
    biggest = 0

    class Watch(GuardedAllocations):
        def _guard(self, made):
            nonlocal biggest
            biggest = max(biggest, made.numel())
            return super()._guard(made)

    watch = Watch()
    with backend(name), watch:
        optimizer.project(z).sum().backward()
        norm = optimizer.norm_sq()
        optimizer.step(clip=1.0 / norm)
    watch.check()
    # partial sums of dz and of the Gram matrix are bounded by the splits of this small case, not by the weight
    assert biggest <= max(weight.numel() // nz * batch, 300 * batch * nz if name == "triton" else 64 * nz)
    assert z.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("name", FAST)
def test_norm_of_cancelling_gradients(name):
    """G^T Z of two sentences that cancel: the Gram form subtracts large numbers and must not return NaN or a negative."""
    require("latent_kv", name)
    weight = make_weight()
    grad, z = torch.randn(*SHAPE[:2], 1, *SHAPE[2:]), torch.randn(1, NZ)
    with backend(name):
        norm = latent_kv_norm(weight, [torch.cat([grad, -grad], dim=2)], [torch.cat([z, z])])
        single = latent_kv_norm(weight, [grad], [z])
    assert 0.0 <= norm.item() <= 1e-6 * single.item()


@pytest.mark.parametrize("name", FAST)
def test_nan_gradients_reach_norm_and_weight(name):
    require("latent_kv", name)
    weight = make_weight()
    optimizer = LatentKVAdamW(weight)
    with backend(name):
        memory = optimizer.project(torch.randn(3, NZ))
        memory.backward(torch.full_like(memory, float("nan")))
        assert optimizer.norm_sq().isnan()
        optimizer.step()
    assert weight.isnan().all()


@pytest.mark.parametrize("name", FAST)
def test_bits_do_not_depend_on_threads(name):
    require("latent_kv", name)
    weight = torch.randn(2, 2, 2, 40, 8, 16) if name == "cpp" else torch.randn(*SHAPE, NZ)
    z = torch.randn(9, weight.shape[-1])
    grad = torch.randn(2, 2, 9, *weight.shape[2:5])
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            state = [weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)]
            with backend(name):
                norm = latent_kv_norm(weight, [grad], [z])
                scalars = {"step": torch.tensor(1.0), "lr": torch.tensor(0.1), "clip": torch.tensor(1.0)}
                latent_kv_adamw(*state, [grad], [z], **scalars)
            results.append([norm, *state])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


# ---- the optimizer object --------------------------------------------------------------------------------------------


def run_steps(optimizer, data):
    for micro in data:
        for z, factor in micro:
            loss_of(optimizer.project(z), factor).backward()
        optimizer.step()


def test_flat_parameters_and_a_resumed_run_give_the_same_bits():
    start, data = make_weight(), batches(4, 1, 3)
    whole = LatentKVAdamW(torch.nn.Parameter(start.detach().clone()), **OPTIONS)
    run_steps(whole, data)
    flat = torch.nn.Parameter(start.detach().clone().view(SHAPE[0], -1, NZ))
    first = LatentKVAdamW(flat, SHAPE, **OPTIONS)
    run_steps(first, data[:2])
    saved, weights = copy.deepcopy(first.state_dict()), flat.detach().clone()
    second = LatentKVAdamW(torch.nn.Parameter(weights), SHAPE, lr=1.0)
    second.load_state_dict(saved)
    run_steps(second, data[2:])
    assert second.param_groups[0]["lr"] == OPTIONS["lr"]
    assert torch.equal(second.weight.view(*SHAPE, NZ), whole.weight)
    assert second.state[second.weight]["step"].item() == 4


def test_checkpoints_are_interchangeable_with_torchs_adamw():
    start, data = make_weight(), batches(3, 1, 3)
    other = torch.nn.Parameter(start.detach().clone())
    theirs = torch.optim.AdamW([other], **OPTIONS)
    for micro in data[:2]:
        for z, factor in micro:
            loss_of(latent_kv(z, other), factor).backward()
        theirs.step()
        theirs.zero_grad()
    ours = LatentKVAdamW(torch.nn.Parameter(other.detach().clone()))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    back = torch.optim.AdamW([torch.nn.Parameter(other.detach().clone())])
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    run_steps(ours, data[2:])
    for z, factor in data[2]:
        loss_of(latent_kv(z, other), factor).backward()
    theirs.step()
    torch.testing.assert_close(ours.weight, other)
    assert set(back.state[back.param_groups[0]["params"][0]]) >= {"step", "exp_avg", "exp_avg_sq"}


def test_moments_of_bf16_weights_stay_fp32_through_a_checkpoint():
    optimizer = LatentKVAdamW(make_weight(torch.bfloat16))
    run_steps(optimizer, batches(1, 1, 3, torch.bfloat16))
    again = LatentKVAdamW(make_weight(torch.bfloat16))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state, restored = optimizer.state[optimizer.weight], again.state[again.weight]
    assert restored["exp_avg"].dtype == torch.float32
    assert torch.equal(restored["exp_avg"], state["exp_avg"])


def test_learning_rate_schedulers_drive_it():
    optimizer = LatentKVAdamW(make_weight(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    run_steps(optimizer, batches(1, 1, 3))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_without_gradients_step_changes_nothing():
    weight = make_weight()
    before = weight.detach().clone()
    optimizer = LatentKVAdamW(weight)
    with torch.no_grad():
        optimizer.project(torch.randn(2, NZ))
    assert optimizer.norm_sq() == 0
    optimizer.step()
    memory = optimizer.project(torch.randn(2, NZ))
    memory.sum().backward()
    assert optimizer.rank == 2
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.state[weight]["step"] == 0


def test_bias_and_z_get_their_gradients():
    weight, bias = make_weight(), torch.nn.Parameter(torch.randn(SHAPE))
    z = torch.randn(4, NZ, requires_grad=True)
    factor = torch.randn(*SHAPE[:2], 4, *SHAPE[2:])
    loss_of(LatentKVAdamW(weight).project(z, bias), factor).backward()
    want = torch.autograd.grad(loss_of(latent_kv(z, weight, bias), factor), (z, bias))
    torch.testing.assert_close(z.grad, want[0])
    torch.testing.assert_close(bias.grad, want[1])


def test_functions_trace_whole():
    weight, z = make_weight().detach(), torch.randn(4, NZ)
    grad = torch.randn(*SHAPE[:2], 4, *SHAPE[2:])

    def update(weight, m, v, grad, z, step, lr):
        clip = 1.0 / latent_kv_norm(weight, [grad], [z]).sqrt()
        latent_kv_adamw(weight, m, v, [grad], [z], step=step, lr=lr, clip=clip)
        return clip

    states = []
    for run in (update, torch.compile(update, fullgraph=True, backend="aot_eager")):
        state = [weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)]
        clip = run(*state, grad, z, torch.tensor(1.0), torch.tensor(0.1))
        states.append([clip, *state])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("name", FAST)
def test_opcheck(name):
    require("latent_kv", name)
    weight, z = make_weight().detach(), torch.randn(4, NZ)
    grad = torch.randn(*SHAPE[:2], 4, *SHAPE[2:])
    opcheck("latent_kv_norm", (weight, [grad], [z], [], 0.0), name)
    scalars = [torch.tensor(x) for x in (1.0, 0.1, 1.0)]
    moments = [torch.zeros_like(weight), torch.zeros_like(weight)]
    opcheck("latent_kv_adamw", (weight, *moments, [grad], [z], [], 0.0, *scalars, 0.9, 0.999, 1e-8, 0.01), name)
