"""The eager reference against what LangVAE 0.6.13 itself recorded (shared/golden), on current transformers.

The records were made in eval mode (no dropout): only then are they reproduced.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lmvae_fast.integrations.langvae import load_reference

FOLDERS = ("langvae_gpt2", "langvae_llama")


@pytest.fixture(scope="module", params=FOLDERS)
def golden(request, shared):
    """The reference model of one golden folder, its recorded tensors and its settings."""
    folder = shared / "golden" / request.param
    record = load_file(folder / "record.safetensors")
    settings = json.loads((folder / "record.json").read_text())
    return load_reference(folder / "langvae_checkpoint"), record, settings


def training_forward(golden, **changes):
    model, record, settings = golden
    options = {"beta": settings["beta"], "target_kl": settings["target_kl"], "eps": record["eps"], **changes}
    return model.loss(settings["sentences"], **options)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def test_tokens_and_posterior(golden):
    model, record, settings = golden
    assert torch.equal(model.target_ids(settings["sentences"]), record["target_ids"])
    mu, logvar = model.encode(settings["sentences"])
    torch.testing.assert_close(mu, record["mu"], rtol=0, atol=2e-6)
    torch.testing.assert_close(logvar, record["logvar"], rtol=0, atol=2e-6)


def test_probabilities_and_greedy_ids(golden):
    _, record, _ = golden
    out = training_forward(golden)
    torch.testing.assert_close(out.z, record["z"], rtol=0, atol=2e-6)
    torch.testing.assert_close(out.probabilities, record["probabilities"], rtol=0, atol=2e-5)
    assert torch.equal(out.probabilities.argmax(-1), record["argmax_ids"])


def test_loss_and_every_recorded_gradient(golden):
    model, record, _ = golden
    model.zero_grad()
    out = training_forward(golden)
    for name, value in (("loss", out.loss), ("recon_loss", out.reconstruction), ("kl_loss", out.kl)):
        assert abs(value.item() / record[name].item() - 1) < 1e-5, name
    out.loss.backward()
    names = {name for name in record if name.startswith("grad_")}
    assert len(names) == 1 + 2 * len(model.context_hidden)
    for name in names:
        parameter = model.linear.weight if name == "grad_encoder_linear" else model.get_parameter(name[len("grad_") :])
        assert relative(parameter.grad, record[name]) < 1e-4, name


def test_decoded_ids_and_sentences(golden):
    model, record, settings = golden
    assert torch.equal(model.decode_ids(record["decode_z"]), record["decode_ids"])
    assert model.decode(record["decode_z"]) == settings["decoded"]


def test_the_record_tells_losses_apart(golden):
    """A wrong loss, threshold or dropout must not pass the checks above."""
    model, record, _ = golden
    want = record["loss"].item()
    assert abs(training_forward(golden, objective="elbo").loss.item() / want - 1) > 1e-2
    assert abs(training_forward(golden, beta=0.0).loss.item() / want - 1) > 1e-4
    model.train()
    noisy = training_forward(golden).probabilities
    model.eval()
    assert (noisy - record["probabilities"]).abs().max() > 1e-2
