"""The step-by-step oracle against the visibility table written as a mask over one parallel pass of the HF model."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from lmvae_fast.errors import ConfigError, DataError, LatentError, UnsupportedDecoderError
from lmvae_fast.reference import stepwise_greedy, stepwise_logits
from lmvae_fast.reference.precision import double_precision
from lmvae_fast.reference.stepwise import VISIBILITIES
from lmvae_fast.testing import FAMILIES, VOCABULARY, WINDOWED, memory_shape, tiny_decoder

BATCH, STEPS, SLOTS = 2, 6, 7  # one slot more than tokens, as LangVAE has it

CASES = [(f, v, w) for f in FAMILIES for v in VISIBILITIES for w in ((None, 3) if f in WINDOWED else (None,))]


def visible(visibility: str, i: int) -> list[int]:
    """Columns (slot j at j, token t at SLOTS + t) seen by token i, oldest first: the design's table."""
    slot, token = (lambda j: j), (lambda t: SLOTS + t)
    if visibility == "prefix":
        return [slot(j) for j in range(SLOTS)] + [token(t) for t in range(i + 1)]
    if visibility == "rolling":
        return [slot(0), token(0)] if i == 0 else [slot(j) for j in range(1, i + 1)] + [token(i - 1), token(i)]
    return [column for t in range(i + 1) for column in (slot(t), token(t))]


def additive_mask(visibility: str, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.full((STEPS, SLOTS + STEPS), torch.finfo(dtype).min, dtype=dtype)
    for i in range(STEPS):
        columns = visible(visibility, i)
        mask[i, columns[-window:] if window else columns] = 0
    return mask.expand(BATCH, 1, STEPS, SLOTS + STEPS)


def parallel_logits(model, ids, memory, visibility, window, shift=None):
    """One pass of the HF model over all tokens: memory in the cache, the table as a 4D mask."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(memory):
        cache.update(keys, values, layer)
    full, sliding = (additive_mask(visibility, w, memory.dtype) for w in (None, window))
    family = model.config.model_type
    types = getattr(model.config, "layer_types", None)
    if family in ("gemma2", "gemma3_text", "qwen2", "qwen3"):
        mask = {"full_attention": full, "sliding_attention": sliding}
        assert window is None or "sliding_attention" in types
    else:
        mask = sliding  # every layer slides, or none
    positions = {
        "prefix": [SLOTS + i for i in range(STEPS)],
        "rolling": [i + 1 for i in range(STEPS)],
        "interleaved": [2 * i + 1 for i in range(STEPS)],
    }[visibility]
    embeds = model.get_input_embeddings()(ids)
    if shift is not None:
        embeds = embeds + shift[:, None]
    return model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=torch.tensor(positions).expand(BATCH, -1),
        past_key_values=cache,
        use_cache=True,
    ).logits


def case(family, window=None, dtype=torch.float32):
    model = tiny_decoder(family, window=window)
    if dtype == torch.float64:
        model = double_precision(model)
    model.requires_grad_(False)
    memory = torch.randn(memory_shape(model, BATCH, SLOTS), dtype=dtype).requires_grad_()
    ids = torch.randint(3, VOCABULARY, (BATCH, STEPS))
    return model, memory, ids


@pytest.mark.parametrize(("family", "visibility", "window"), CASES)
def test_equals_masked_parallel_pass_in_fp64(family, visibility, window):
    model, memory, ids = case(family, window, torch.float64)
    want = parallel_logits(model, ids, memory, visibility, window)
    cotangent = torch.randn_like(want)
    (want_grad,) = torch.autograd.grad(want, memory, cotangent)
    got = stepwise_logits(model, ids, memory, visibility=visibility)
    (got_grad,) = torch.autograd.grad(got, memory, cotangent)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(got_grad, want_grad, rtol=0, atol=1e-12 * max(1.0, want_grad.abs().max().item()))


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_loss_and_gradient_equal_in_fp32(family, visibility):
    model, memory, ids = case(family)
    labels = torch.randint(3, VOCABULARY, ids.shape)
    losses, gradients = [], []
    for logits in (
        stepwise_logits(model, ids, memory, visibility=visibility),
        parallel_logits(model, ids, memory, visibility, None),
    ):
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
        gradients.append(torch.autograd.grad(losses[-1], memory)[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[1].abs().max()


def test_visibilities_and_windows_differ():
    """Otherwise the comparisons above could not fail."""
    model, memory, ids = case("gemma2")
    outputs = [stepwise_logits(model, ids, memory, visibility=v) for v in VISIBILITIES]
    narrow = stepwise_logits(tiny_decoder("gemma2", window=3), ids, memory, visibility="interleaved")
    for a, b in [(0, 1), (1, 2), (0, 2)]:
        assert (outputs[a] - outputs[b]).abs().max() > 1e-2
    assert (outputs[2] - narrow).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_without_memory_it_is_the_plain_model(family):
    model, _, ids = case(family)
    with torch.no_grad():
        torch.testing.assert_close(stepwise_logits(model, ids), model(ids).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_embedding_shift_reaches_every_token(family):
    model, memory, ids = case(family, dtype=torch.float64)
    shift = torch.randn(BATCH, model.config.hidden_size, dtype=torch.float64)
    got = stepwise_logits(model, ids, memory, embedding_shift=shift)
    want = parallel_logits(model, ids, memory, "prefix", None, shift)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_output_residual_is_added_before_the_head(family):
    model, memory, ids = case(family, dtype=torch.float64)
    residual = torch.randn(BATCH, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    got = stepwise_logits(model, ids, memory, output_residual=residual)
    plain = stepwise_logits(model, ids, memory)
    cap = getattr(model.config, "final_logit_softcapping", None)
    moved = residual[:, None] @ model.get_output_embeddings().weight.T
    want = plain + moved if cap is None else cap * torch.tanh(torch.atanh(plain / cap) + moved / cap)
    torch.testing.assert_close(got, want.expand_as(got), rtol=1e-9, atol=1e-9)
    got.sum().backward()
    assert residual.grad.abs().max() > 0
    assert not model.get_output_embeddings()._forward_pre_hooks, "the hook must not outlive the call"


@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_greedy_reads_its_own_choice(visibility):
    model, memory, _ = case("llama")
    start = torch.tensor([1, 1])
    ids, logits = stepwise_greedy(model, start, STEPS, memory, visibility=visibility)
    read = torch.cat([start[:, None], ids[:, :-1]], dim=1)
    torch.testing.assert_close(logits, stepwise_logits(model, read, memory, visibility=visibility), rtol=0, atol=0)
    assert torch.equal(ids, logits.argmax(-1))


def test_bad_input_is_refused():
    model, memory, ids = case("llama")
    with pytest.raises(ConfigError, match="visibility"):
        stepwise_logits(model, ids, memory, visibility="rolled")
    with pytest.raises(ConfigError, match="needs a memory"):
        stepwise_logits(model, ids, None, visibility="rolling")
    with pytest.raises(LatentError, match="one slot per token"):
        stepwise_logits(model, ids, memory[..., : STEPS - 1, :], visibility="rolling")
    with pytest.raises(LatentError, match="kv_heads=2"):
        stepwise_logits(model, ids, memory.repeat(1, 1, 1, 2, 1, 1))
    with pytest.raises(DataError, match="batch"):
        stepwise_logits(model, ids[:1], memory)


def test_a_decoder_without_an_ordinary_cache_is_refused():
    import transformers as hf

    config = hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    config.num_attention_heads = 2
    with pytest.raises((UnsupportedDecoderError, TypeError)):
        stepwise_logits(hf.MambaForCausalLM(config).eval(), torch.ones(1, 2, dtype=torch.long))
