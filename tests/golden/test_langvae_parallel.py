"""The model's one parallel pass, on its own greedy output, against what LangVAE 0.6.13 itself recorded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lmvae_fast.integrations.langvae import load_checkpoint
from lmvae_fast.models.free_running import greedy_ids

FOLDERS = ("langvae_gpt2", "langvae_llama")


@pytest.fixture(scope="module", params=FOLDERS)
def golden(request, shared):
    """Our model from a golden folder's checkpoint, training as LangVAE does; the recorded tensors; the settings."""
    folder = shared / "golden" / request.param
    record = load_file(folder / "record.safetensors")
    settings = json.loads((folder / "record.json").read_text())
    model = load_checkpoint(
        folder / "langvae_checkpoint",
        objective="langvae-0.6",
        free_running=True,
        kl_target=settings["target_kl"],
    )
    return model, record, settings


def batch_of(model, settings):
    return model.make_batch(model.tokenize(settings["sentences"]))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def test_tokens_and_posterior(golden):
    model, record, settings = golden
    sentences = model.tokenize(settings["sentences"])
    assert torch.tensor(sentences.ids).equal(record["target_ids"])
    posterior = model.encode(model.make_batch(sentences))
    torch.testing.assert_close(posterior.mu, record["mu"], rtol=0, atol=2e-6)
    torch.testing.assert_close(posterior.logvar, record["logvar"], rtol=0, atol=2e-6)
    from_texts = model.encode(settings["sentences"])
    torch.testing.assert_close(from_texts.mu, record["mu"], rtol=0, atol=2e-6)


@torch.no_grad()
def test_probabilities_and_greedy_ids(golden):
    model, record, settings = golden
    batch = batch_of(model, settings)
    injection = model.inject(record["z"])
    hidden = model.decoder.hidden(
        model.greedy_inputs(batch, injection),
        injection,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        rows=batch.rows,
        token_index=batch.token_index,
    )
    probabilities = model.decoder.logits(hidden).softmax(-1).view_as(record["probabilities"])
    torch.testing.assert_close(probabilities, record["probabilities"], rtol=0, atol=2e-5)
    assert torch.equal(probabilities.argmax(-1), record["argmax_ids"])


def test_loss_and_every_recorded_gradient(golden):
    model, record, settings = golden
    model.zero_grad()
    out = model(batch_of(model, settings), beta=settings["beta"], eps=record["eps"])
    assert abs(out.loss.item() / record["loss"].item() - 1) < 1e-5
    assert abs(out.reconstruction.mean().item() / record["recon_loss"].item() - 1) < 1e-5
    assert abs(settings["beta"] * out.kl.mean().item() / record["kl_loss"].item() - 1) < 1e-5
    out.loss.backward()
    gradients = {"grad_encoder_linear": model.posterior_head.weight.grad}
    for layer in range(model.decoder.num_layers):
        gradients[f"grad_context_hidden.{layer}.weight"] = model.projector.weight.grad[layer]
        gradients[f"grad_context_hidden.{layer}.bias"] = model.projector.bias.grad[layer]
    assert gradients.keys() == {name for name in record if name.startswith("grad_")}
    for name, gradient in gradients.items():
        assert relative(gradient, record[name]) < 1e-4, name


@torch.no_grad()
def test_decoded_ids_and_sentences(golden):
    model, record, settings = golden
    ids = greedy_ids(model.decoder, model.inject(record["decode_z"]), settings["max_len"])
    assert torch.equal(ids, record["decode_ids"])
    assert model.decoder.tokenizer.decode(ids.tolist()) == settings["decoded"]
    # The generation engine trims the space that stands before a sentence's first word.
    texts = model.decode(record["decode_z"], max_new_tokens=settings["max_len"])
    assert texts == [text.strip() for text in settings["decoded"]]


def test_teacher_forcing_is_another_loss(golden):
    """Otherwise reading its own output would not have been tested."""
    model, record, settings = golden
    batch = batch_of(model, settings)
    forced = model.score(batch, record["z"]).sum().item()
    free = model(batch, beta=settings["beta"], eps=record["eps"]).nll.sum().item()
    assert abs(forced / free - 1) > 1e-3
