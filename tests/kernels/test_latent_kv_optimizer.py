"""LatentKVAdamW as a torch optimizer: what accumulates and what does not, options, closures, copies, frozen weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lmvae_fast.kernels.latent_kv import LatentKVAdamW, latent_kv
from lmvae_fast.kernels.latent_kv.held_gradient import HeldGradient

from .common import raises_naming

SHAPE, NZ = (1, 2, 1, 6, 4), 5  # L, 2, Hkv, M, D


def make(**options):
    """A weight, its optimizer, and latents that want a gradient."""
    weight = nn.Parameter(torch.randn(*SHAPE, NZ))
    return weight, LatentKVAdamW(weight, **{"lr": 0.1, **options}), torch.randn(3, NZ, requires_grad=True)


def plain_gradient(weight, z):
    twin = weight.detach().clone().requires_grad_()
    latent_kv(z.detach(), twin).square().sum().backward()
    return twin.grad


# ---- what is held ----------------------------------------------------------------------------------------------------


def test_only_what_accumulates_is_held():
    """autograd.grad and backward(inputs=...) leave the weight alone, backward adds to it, as with torch's own leaf."""
    weight, optimizer, z = make()
    loss = optimizer.project(z).square().sum()
    torch.autograd.grad(loss, z, retain_graph=True)
    loss.backward(inputs=[z], retain_graph=True)
    assert optimizer.rank == 0 and weight.grad is None
    loss.backward(retain_graph=True)
    once = optimizer.norm_sq()
    torch.testing.assert_close(once, plain_gradient(weight, z).square().sum())
    loss.backward()
    assert optimizer.rank == 6
    torch.testing.assert_close(optimizer.norm_sq(), 4 * once)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
@pytest.mark.parametrize("inputs", ["a latent that wants a gradient", "a latent that does not"])
def test_create_graph_keeps_numbers_only(inputs):
    _, optimizer, z = make()
    z = z if "not" not in inputs else z.detach()
    optimizer.project(z).square().sum().backward(create_graph=True)
    assert not any(grad.requires_grad for grad, _, _ in optimizer._held())


def test_a_gradient_penalty_is_refused():
    # The weight's part of d(dz)/dW would be lost: 23845 came out for 44270.
    _, optimizer, z = make()
    (dz,) = torch.autograd.grad(optimizer.project(z).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"gradient of z has no derivative.*latent_kv"):
        dz.square().sum().backward()
    # What the memory's own gradient says goes back through the memory once more, and is whole.
    weight, optimizer, z = make()
    memory = optimizer.project(z.detach())
    (seen,) = torch.autograd.grad(memory.pow(3).sum(), memory, create_graph=True)
    seen.square().sum().backward()
    copy = weight.detach().clone().requires_grad_()
    (3 * latent_kv(z.detach(), copy).square()).square().sum().backward()
    torch.testing.assert_close(optimizer.norm_sq(), copy.grad.square().sum())


def test_forward_mode_is_refused_by_name():
    _, optimizer, z = make()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z.detach(), torch.ones_like(z))
        with pytest.raises(ValueError, match="project has no forward-mode derivative"):
            optimizer.project(dual)


def test_zero_grad_of_a_module_forgets():
    for to_none in (True, False):
        weight, optimizer, z = make()
        module = nn.Module()
        module.weight = weight
        optimizer.project(z).sum().backward()
        assert isinstance(weight.grad, HeldGradient) and weight.grad.shape == weight.shape
        module.zero_grad(set_to_none=to_none)
        assert optimizer.rank == 0
        before = weight.detach().clone()
        optimizer.step()
        assert torch.equal(weight, before)
        optimizer.zero_grad()
        assert weight.grad is None


def test_what_would_leave_the_weight_out_is_refused():
    weight, optimizer, z = make()
    optimizer.project(z).sum().backward()
    words = ("LatentKVAdamW", "norm_sq()", "clip=")
    with raises_naming(RuntimeError, *words):
        nn.utils.clip_grad_norm_([weight], 1.0)
    for method in ("unscale_", "step"):
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        with raises_naming(RuntimeError, *words):
            getattr(scaler, method)(optimizer)
    with raises_naming(RuntimeError, *words):
        torch.optim.SGD([weight], lr=0.1).step()
    with raises_naming(RuntimeError, *words):  # the weight used beside project()
        latent_kv(z, weight).sum().backward()
    optimizer.zero_grad()
    latent_kv(z, weight).sum().backward()
    for late in (optimizer.step, lambda: optimizer.project(z)):
        with raises_naming(RuntimeError, "project()", "zero_grad()"):
            late()


def test_a_frozen_weight_does_not_move():
    weight, optimizer, z = make()
    weight.requires_grad_(False)
    before = weight.clone()
    optimizer.project(z).square().sum().backward()
    assert optimizer.rank == 0
    optimizer.step()
    assert torch.equal(weight, before) and optimizer.state[weight]["step"] == 0
    assert not optimizer.project(z.detach()).requires_grad


def test_a_backward_after_the_step_raises():
    """The step writes the weight that the graph still needs: torch's own optimizer raises there."""
    _, optimizer, z = make()
    loss = optimizer.project(z).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_slots_outside_the_weight_are_refused():
    _, optimizer, z = make()
    for slots in (-1, 7):
        with raises_naming(ValueError, f"slots={slots}", 6):
            optimizer.project(z, slots=slots)
    assert optimizer.project(z, slots=6).shape[4] == 6


# ---- torch's contract ------------------------------------------------------------------------------------------------


def test_a_closure_is_called_and_its_loss_returned():
    weight, optimizer, z = make()
    twin = nn.Parameter(weight.detach().clone())
    theirs = torch.optim.AdamW([twin], lr=0.1)

    def ours_loss():
        optimizer.zero_grad()
        loss = optimizer.project(z.detach()).square().sum()
        loss.backward()
        return loss

    def their_loss():
        theirs.zero_grad()
        loss = latent_kv(z.detach(), twin).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        torch.testing.assert_close(optimizer.step(closure=ours_loss), theirs.step(their_loss))
    torch.testing.assert_close(weight, twin)
    with raises_naming(TypeError, "closure", "clip="):
        optimizer.step(torch.ones(()))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_original(way):
    weight, optimizer, z = make()
    optimizer.project(z).sum().backward()
    optimizer.step()
    optimizer.project(z).square().sum().backward()
    other = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert other.weight is not weight
    assert other.rank == optimizer.rank == 3
    for each in (optimizer, other):
        each.step()
        each.project(z).sum().backward()
        each.step()
    assert torch.equal(other.weight, weight)
    assert other.state[other.weight]["step"] == 3


def test_a_weight_is_copied_without_what_its_optimizer_holds():
    _, optimizer, z = make()
    optimizer.project(z).sum().backward()
    for weight in (copy.deepcopy(optimizer.weight), copy.deepcopy(optimizer.weight.grad)):
        assert weight is None or weight.grad is None


def test_a_second_group_is_refused():
    _, optimizer, _ = make()
    with raises_naming(ValueError, "LatentKVAdamW", "one weight"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("options", [{"maximize": True}, {"weight_decay": 0.3, "betas": (0.5, 0.9)}])
def test_options_of_a_loaded_state_are_honoured(options):
    weight, optimizer, z = make()
    theirs = torch.optim.AdamW([nn.Parameter(weight.detach().clone())], lr=0.1, **options)
    twin = theirs.param_groups[0]["params"][0]

    def step_of_theirs():
        latent_kv(z.detach(), twin).square().sum().backward()
        theirs.step()
        theirs.zero_grad()

    step_of_theirs()
    with torch.no_grad():
        weight.copy_(twin)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    step_of_theirs()
    optimizer.project(z).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(weight, twin)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("amsgrad", lambda p: torch.optim.AdamW([p], amsgrad=True)),
        ("differentiable", lambda p: torch.optim.AdamW([p], differentiable=True)),
        ("decoupled_weight_decay", lambda p: torch.optim.Adam([p])),
    ],
)
def test_options_it_does_not_have_are_refused(name, other):
    weight, optimizer, z = make()
    before = copy.deepcopy(optimizer.state_dict())
    with raises_naming(ValueError, "LatentKVAdamW", name, "torch.optim.AdamW"):
        optimizer.load_state_dict(other(nn.Parameter(weight.detach().clone())).state_dict())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    optimizer.param_groups[0][name] = name != "decoupled_weight_decay"
    optimizer.project(z).sum().backward()
    with raises_naming(ValueError, name):
        optimizer.step()
    assert optimizer.state[weight]["step"] == 0


def test_a_state_of_another_weight_is_refused_whole():
    weight, optimizer, _ = make()
    small = nn.Parameter(torch.randn(1, 2, 1, 3, 4, NZ))
    with raises_naming(ValueError, "exp_avg", list(small.shape), list(weight.shape)):
        optimizer.load_state_dict(LatentKVAdamW(small, lr=7.0).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_step_that_fails_counts_nothing():
    weight, optimizer, z = make()
    optimizer.project(z).sum().backward()
    with raises_naming(ValueError, "clip", [2]):
        optimizer.step(clip=torch.ones(2))
    assert optimizer.state[weight]["step"] == 0
    optimizer.step()
    assert optimizer.state[weight]["step"] == 1
