"""fp16 with a gradient scaler, from the loss to the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from lmvae_fast.models import lmvae, token_losses
from lmvae_fast.testing import SENTENCES, make_model
from tests.training.helpers import run


def eager_loss(hidden, weight, labels, *, bias=None, token_weights=None, softcap=None, logit_scale=1.0):
    """What `lm_head_loss` gives, by torch's own layers."""
    assert softcap is None and logit_scale == 1.0
    nll = cross_entropy(linear(hidden, weight, bias).float(), labels, reduction="none")
    return (nll if token_weights is None else nll * token_weights).sum(), nll


def confident(monkeypatch: pytest.MonkeyPatch) -> tuple[lmvae.LMVAE, Callable[[], torch.Tensor]]:
    """A model and the loss of a batch of which it is nearly sure: the gradient of a logit is some 1e-8."""
    model = make_model(max_len=12).eval()  # without dropout
    with torch.no_grad():  # larger states, sharper distributions
        model.decoder.model.transformer.ln_f.weight.mul_(20.0)
    batch = model.make_batch(model.tokenize(list(SENTENCES)))
    eps = torch.randn(len(SENTENCES), 6, generator=torch.Generator().manual_seed(1))
    found: list[torch.Tensor] = []

    def remember(hidden, weight, labels, **options):
        nll, best = linear(hidden.double(), weight.double()).log_softmax(-1).max(-1)
        sure = (nll > -1e-5) & (nll < -1e-8)
        found.append(torch.where(sure, best, -100))
        return eager_loss(hidden, weight, labels, **options)

    with monkeypatch.context() as patch:
        patch.setattr(token_losses, "lm_head_loss", remember)
        model(batch, beta=0.0, eps=eps)
    sure_of = replace(batch, labels=found[0])
    assert int((found[0] >= 0).sum()) > 5
    return model, lambda: model(sure_of, beta=0.0, eps=eps).loss


def gradients(model: lmvae.LMVAE, loss: Callable[[], torch.Tensor], precision: str) -> torch.Tensor:
    """Gradients of all that trains, as one vector."""
    trained = [value for value in model.parameters() if value.requires_grad]
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    optimizer = torch.optim.SGD(trained, lr=0.1)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16, enabled=precision == "fp16"):
        value = loss()
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    return torch.cat([value.grad.flatten().double() for value in trained])


def test_small_gradients_of_a_whole_model_reach_its_weights(monkeypatch):
    """Where a model is nearly sure, as far from fp32 as torch's own head is, where rows kept in fp16 would all be 0."""
    model, loss = confident(monkeypatch)
    truth, ours = gradients(model, loss, "fp32"), gradients(model, loss, "fp16")
    monkeypatch.setattr(token_losses, "lm_head_loss", eager_loss)
    theirs = gradients(model, loss, "fp16")
    size, error, theirs_error = truth.norm(), (ours - truth).norm(), (theirs - truth).norm()
    assert 0 < size < 1e-2
    assert error <= 1.1 * theirs_error
    assert error < 0.1 * size


def test_a_run_in_fp16_moves_its_weights_as_one_in_fp32_does(tmp_path):
    """With a scale found at the start, no step skipped for good, and every weight that trains moved."""
    moved = {}
    for precision in ("fp32", "fp16"):
        model = make_model(max_len=12)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        options = {"max_steps": 10, "beta_schedule": "constant", "beta": 0.1, "learning_rate": 0.01}
        run(tmp_path / precision, model=model, precision=precision, **options)
        moved[precision] = {name: value.detach() - before[name] for name, value in model.named_parameters()}
        assert all(value.dtype == torch.float32 for value in model.parameters())
        for name, value in model.named_parameters():
            assert bool(moved[precision][name].any()) == value.requires_grad, name
    for name, value in moved["fp32"].items():
        if value.any():
            similar = torch.cosine_similarity(value.flatten(), moved["fp16"][name].flatten(), dim=0)
            assert similar > 0.95, f"{name}: {similar}"
