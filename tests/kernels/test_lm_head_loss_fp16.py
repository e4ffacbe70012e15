"""lm_head_loss under a loss scale: what fp16 would lose before the scale arrives is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from lmvae_fast.kernels.backend import backend
from lmvae_fast.kernels.lm_head_loss import lm_head_loss

from .common import require

SCALE = 2.0**16  # where torch's GradScaler begins
TOKENS, WIDTH, VOCABULARY = 24, 64, 300


def confident(margin: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp16 hidden states whose logits favour their labels by about ``margin`` nats."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.02).half()
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    towards = weight[labels].float() * margin / (WIDTH * 0.02**2)
    return (torch.randn(TOKENS, WIDTH, generator=generator) + towards).half(), weight, labels


def gradient(loss_of, hidden: Tensor, scale: float) -> Tensor:
    leaf = hidden.clone().requires_grad_()
    (loss_of(leaf) * scale).backward()
    return leaf.grad.double() / scale


@pytest.mark.parametrize("name", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("margin", [6.0, 18.0, 30.0])  # from gradients that fp16 holds to such as it does not
def test_small_gradients_are_kept_until_the_loss_scale_arrives(name, margin):
    """Fewer zeros, and no larger an error, than torch's own fp16 layers under the same loss scale, over several draws."""
    require("lm_head_loss", name, torch.float16)
    errors, zeros, sizes = torch.zeros(2, dtype=torch.float64), [0, 0], 0.0
    for seed in range(4):
        hidden, weight, labels = confident(margin, seed)
        truth = gradient(lambda h, w=weight, y=labels: cross_entropy(h @ w.double().T, y), hidden.double(), 1.0)
        theirs = gradient(lambda h, w=weight, y=labels: cross_entropy(linear(h, w).float(), y), hidden, SCALE)
        with backend(name):
            ours = gradient(lambda h, w=weight, y=labels: lm_head_loss(h, w, y)[0] / TOKENS, hidden, SCALE)
        for i, found in enumerate((ours, theirs)):
            errors[i] += (found - truth).square().sum()
            zeros[i] += int((found == 0).sum())
        sizes += float(truth.square().mean().sqrt()) / 4
    assert sizes < {6.0: 1e-2, 18.0: 1e-5, 30.0: 1e-7}[margin], "not as confident as meant"
    assert errors[0].sqrt() <= 1.1 * errors[1].sqrt()
    assert zeros[0] <= zeros[1]
