"""lm_head_loss with a trained head: one copy of the weight's gradient, which is as large as the head."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.backend import backend
from lmvae_fast.kernels.lm_head_loss import lm_head_loss
from lmvae_fast.profiling.measure import peak_memory

from .common import require

EVERY = ("reference", "cpp", "triton")
TOKENS, WIDTH, VOCABULARY = 12, 64, 12_000  # the gradient takes 3.1 MB, the logits of all tokens 0.6 MB
COPY = VOCABULARY * WIDTH * 4


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)


@pytest.mark.parametrize("name", EVERY)
def test_a_trained_head_has_one_copy_of_its_gradient(name):
    """Of the step's peak, the gradient that stays is one copy; a second would be as much again."""
    require("lm_head_loss", name)
    hidden, weight, labels = problem()

    def step() -> None:
        hidden.grad = weight.grad = None
        loss, _ = lm_head_loss(hidden, weight, labels, token_weights=torch.full((TOKENS,), 0.5))
        (3.0 * loss).backward()

    with backend(name):
        step()  # what a first call allocates for good
        weight.grad = hidden.grad = None
        peak = peak_memory(step, "cpu", warm=True)
    assert COPY <= peak < 1.6 * COPY, f"{peak / COPY:.2f} copies"


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("factor", [3.0, 1.0])
def test_backward_again_makes_the_gradient_anew(name, factor):
    """What the first backward hands over is scaled in place; a second one over the same graph must not scale it again."""
    require("lm_head_loss", name)
    hidden, weight, labels = problem()
    bias = torch.randn(VOCABULARY).requires_grad_()
    leaves = (hidden, weight, bias)
    with backend(name):
        loss, _ = lm_head_loss(hidden, weight, labels, bias=bias)
        first = torch.autograd.grad(loss, leaves, torch.tensor(factor), retain_graph=True)
        kept = [gradient.clone() for gradient in first]
        second = torch.autograd.grad(loss, leaves, torch.tensor(2 * factor), retain_graph=True)
        third = torch.autograd.grad(loss, leaves, torch.tensor(factor))
    for before, one, two, three in zip(kept, first, second, third, strict=True):
        assert torch.equal(one, before)  # what was handed over stays as it was
        torch.testing.assert_close(two, 2 * before, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(three, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_a_frozen_head_costs_nothing_and_does_not_move(name):
    """No gradient of it is made, of its size or any other, and an optimizer that was given it leaves it alone."""
    require("lm_head_loss", name)
    hidden, weight, labels = problem()
    weight.requires_grad_(False)
    before = weight.clone()
    optimizer = torch.optim.AdamW([hidden, weight], weight_decay=0.1)

    def step() -> None:
        hidden.grad = None
        lm_head_loss(hidden, weight, labels)[0].backward()

    with backend(name):
        step()
        hidden.grad = None
        peak = peak_memory(step, "cpu", warm=True)
    assert peak < COPY, f"{peak / COPY:.2f} times the head"
    assert weight.grad is None
    moves = hidden.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before)
    assert not torch.equal(hidden, moves)


def test_gradients_add_up_over_micro_batches():
    hidden, weight, labels = problem()
    for scale in (0.25, 0.75):
        (scale * lm_head_loss(hidden, weight, labels)[0]).backward()
    summed = weight.grad.clone()
    weight.grad = None
    lm_head_loss(hidden, weight, labels)[0].backward()
    torch.testing.assert_close(summed, weight.grad, rtol=1e-5, atol=1e-6)
