"""The parallel pass against the step-by-step oracle: logits, loss and gradients, every visibility, every family."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.lm_head_loss import lm_head_loss
from lmvae_fast.models.injection import Injection
from lmvae_fast.reference.precision import ATTENTION as PLAIN
from lmvae_fast.reference.stepwise import stepwise_logits
from lmvae_fast.testing import FAMILIES, VOCABULARY, make_decoder
from lmvae_fast.text.batch import pack

VISIBILITIES = ("prefix", "rolling", "interleaved")
LENGTHS = (7, 1, 5, 2)  # the longest fills the slots; one token; two that end on another step


def problem(decoder, visibility, dtype, *, slots=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, longest = len(LENGTHS), max(LENGTHS)
    slots = slots or (3 if visibility == "prefix" else longest + 1)
    shape = (decoder.num_layers, 2, batch, decoder.kv_heads, slots, decoder.head_dim)
    memory = torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
    shift = (0.3 * torch.randn(batch, decoder.hidden_size, generator=generator, dtype=dtype)).requires_grad_()
    residual = (0.3 * torch.randn(batch, decoder.hidden_size, generator=generator, dtype=dtype)).requires_grad_()
    ids = torch.randint(3, VOCABULARY, (batch, longest + 1), generator=generator)
    return memory, shift, residual, ids


def parallel_loss(decoder, injection, ids):
    inputs = [row[:length].tolist() for row, length in zip(ids, LENGTHS, strict=True)]
    labels = [row[1 : length + 1].tolist() for row, length in zip(ids, LENGTHS, strict=True)]
    packed = pack(inputs, labels)
    hidden = decoder.hidden(
        packed["input_ids"], injection, cu_seqlens=packed["cu_seqlens"], max_seqlen=packed["max_seqlen"],
        rows=packed["rows"], token_index=packed["token_index"],
    )  # fmt: skip
    loss, nll = lm_head_loss(
        hidden, decoder.head_weight, packed["labels"], bias=decoder.head_bias, softcap=decoder.softcap
    )
    return loss, nll


def stepwise_loss(model, injection, ids):
    logits = stepwise_logits(
        model, ids[:, :-1], injection.memory, visibility=injection.visibility, embedding_shift=injection.embedding_shift,
        output_residual=injection.output_residual,
    )  # fmt: skip
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    nll = nll.view(ids.shape[0], -1)
    return torch.cat([row[:length] for row, length in zip(nll, LENGTHS, strict=True)])


def compare(family, visibility, dtype, tolerance, window=None):
    model, decoder = make_decoder(family, dtype=dtype, window=window)
    memory, shift, residual, ids = problem(decoder, visibility, dtype)
    injection = Injection(visibility, memory, shift, residual)
    leaves = (memory, shift, residual)
    loss, nll = parallel_loss(decoder, injection, ids)
    gradients = torch.autograd.grad(loss, leaves)
    model.set_attn_implementation(PLAIN if dtype == torch.float64 else "eager")
    try:
        expected_nll = stepwise_loss(model, injection, ids)
        expected = torch.autograd.grad(expected_nll.sum(), leaves)
    finally:
        model.set_attn_implementation("lmvae")
    torch.testing.assert_close(nll.to(dtype), expected_nll, atol=tolerance, rtol=tolerance)
    for got, want in zip(gradients, expected, strict=True):
        assert want.abs().max() > 0
        assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_step_by_step_loop(family, visibility):
    compare(family, visibility, torch.float64, 1e-12)


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_equals_the_step_by_step_loop_in_fp32(family, visibility):
    compare(family, visibility, torch.float32, 1e-5)


@pytest.mark.parametrize("visibility", ["prefix", "interleaved"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral", "qwen2"])
def test_sliding_windows_are_honoured(family, visibility):
    compare(family, visibility, torch.float64, 1e-12, window=4)
