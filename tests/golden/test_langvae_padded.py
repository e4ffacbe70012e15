"""Sentences of unequal length: LangVAE 0.6.13's own figures (``tests/peers/check_langvae_loads.py --record``).

The golden folders' records have no padding; here some places are, and the released loss counts them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lmvae_fast.integrations.langvae import load_checkpoint, load_reference

RECORDS = json.loads(Path(__file__).with_name("padded.json").read_text())


@pytest.fixture(scope="module", params=sorted(RECORDS))
def padded(request, shared):
    return shared / "golden" / request.param / "langvae_checkpoint", RECORDS[request.param]


def check(figures: dict[str, float], gradients: dict[str, torch.Tensor], record: dict) -> None:
    for name, value in figures.items():
        assert value == pytest.approx(record[name], rel=1e-5), name
    assert gradients.keys() == record["gradient_norms"].keys()
    for name, gradient in gradients.items():
        assert gradient.norm().item() == pytest.approx(record["gradient_norms"][name], rel=1e-4), name


def test_reference(padded):
    folder, record = padded
    model = load_reference(folder)
    eps = torch.tensor(record["eps"])
    out = model.loss(record["sentences"], beta=record["beta"], target_kl=record["target_kl"], eps=eps)
    assert out.target_ids.tolist() == record["target_ids"]
    assert (out.target_ids == model.pad_token_id).any()
    out.loss.backward()
    gradients = {f"decoder.{n}": p.grad for n, p in model.named_parameters() if n.startswith("context_hidden")}
    gradients["encoder.linear.weight"] = model.linear.weight.grad
    check(
        {"loss": out.loss.item(), "recon_loss": out.reconstruction.item(), "kl_loss": out.kl.item()}, gradients, record
    )


def test_parallel_pass(padded):
    folder, record = padded
    model = load_checkpoint(folder, objective="langvae-0.6", free_running=True, kl_target=record["target_kl"])
    batch = model.make_batch(model.tokenize(record["sentences"]))
    out = model(batch, beta=record["beta"], eps=torch.tensor(record["eps"]))
    out.loss.backward()
    gradients = {"encoder.linear.weight": model.posterior_head.weight.grad}
    for layer in range(model.decoder.num_layers):
        gradients[f"decoder.context_hidden.{layer}.weight"] = model.projector.weight.grad[layer]
        gradients[f"decoder.context_hidden.{layer}.bias"] = model.projector.bias.grad[layer]
    figures = {
        "loss": out.loss.item(),
        "recon_loss": out.reconstruction.mean().item(),
        "kl_loss": record["beta"] * out.kl.mean().item(),
    }
    check(figures, gradients, record)
