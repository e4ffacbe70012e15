"""Decoding over packed weights: the same tokens in fp32, as good ones in bf16, those of rounded modules in int8."""

from __future__ import annotations

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError
from lmvae_fast.generation.engine import generate
from lmvae_fast.models.decoder import prepared_weights as packed
from lmvae_fast.models.decoder.examination import in_float32
from lmvae_fast.testing import make_model
from tests.kernels.common import raises_naming


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_packed_weights_give_the_same_texts_and_leave_no_trace(family):
    model = make_model(family).eval()
    z = 2 * torch.randn(16, 6)
    if not packed.pays(model.decoder, 16):
        pytest.skip("weights are not packed here")
    plain = list(generate(model, z, GenerationConfig(pack_weights=False)))
    assert list(generate(model, z)) == plain
    forwards = [module for module in model.decoder.model.modules() if "forward" in module.__dict__]
    assert not forwards
    with packed.packed_weights(model.decoder, 16):
        assert any("forward" in module.__dict__ for module in model.decoder.model.modules())
    with torch.no_grad():  # a changed weight is packed again
        model.decoder.model.get_output_embeddings().weight.mul_(-1)
    changed = list(generate(model, z, GenerationConfig(pack_weights=False)))
    assert changed != plain
    assert list(generate(model, z)) == changed


@torch.no_grad()
def _logits(model, z, ids):
    decoder = model.decoder
    read = torch.tensor([decoder.tokenizer.bos_token_id, *ids])[: len(ids)]
    hidden = decoder.hidden(
        read, model.inject(z), max_seqlen=len(ids), cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        rows=torch.zeros(len(ids), dtype=torch.int64), token_index=torch.arange(len(ids)),
    )  # fmt: skip
    return decoder.logits(hidden).float()


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_greedy_tokens_in_bf16_are_the_most_probable_to_within_its_rounding(family, batch):
    model = make_model(family, dtype=torch.bfloat16).eval()
    z = 2 * torch.randn(8, 6)
    if not packed.pays(model.decoder, batch):
        pytest.skip("weights are not packed here")
    found = list(generate(model, z, GenerationConfig(batch_size=batch)))
    assert len({token for out in found for token in out.ids}) > 3, "a constant output would prove nothing"
    for out in (out for out in found if out.ids):
        plain = _logits(model, z[out.index : out.index + 1], out.ids)
        with in_float32(model):
            truth = _logits(model, z[out.index : out.index + 1], out.ids)
        lost = truth.max(-1).values - truth.gather(-1, torch.tensor(out.ids)[:, None])[:, 0]
        # the token and the best one may both be off: each by twice what Hugging Face's modules are off by
        assert (lost <= 4 * (plain - truth).abs().max()).all()


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3}, {"num_beams": 2}])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_int8_weights_decode_what_rounded_modules_decode_and_leave_no_trace(family, options):
    model = make_model(family).eval()
    z = 2 * torch.randn(8, 6)
    ours = [out.ids for out in generate(model, z, GenerationConfig(weights="int8", **options))]
    assert not [module for module in model.decoder.model.modules() if "forward" in module.__dict__]
    with torch.no_grad():  # the same numbers in the modules themselves
        for module in model.decoder.model.modules():
            if type(module) in (torch.nn.Linear, Conv1D):
                scale = module.weight.abs().amax(1 if type(module) is torch.nn.Linear else 0, keepdim=True) / 127
                module.weight = torch.nn.Parameter((module.weight / scale).round() * scale, requires_grad=False)
    assert ours == [out.ids for out in generate(model, z, GenerationConfig(pack_weights=False, **options))]


def test_int8_weights_are_other_weights():
    model = make_model("gpt2").eval()
    z = 2 * torch.randn(4, 6)
    first, second = (
        torch.tensor([out.logprobs[0] for out in generate(model, z, GenerationConfig(logprobs=True, weights=weights))])
        for weights in (None, "int8")
    )
    assert 1e-6 < (first - second).abs().max() < 0.3


def test_what_int8_weights_are_not_for_is_refused():
    z = torch.randn(2, 6)
    for config, reason in (({"train_decoder": True}, "trains"), ({"dtype": torch.float64}, "float64")):
        with raises_naming(ConfigError, "int8", reason):
            list(generate(make_model("gpt2", **config), z, GenerationConfig(weights="int8")))
    with raises_naming(ConfigError, "weights", "int4", "int8"):
        GenerationConfig(weights="int4")
    with raises_naming(ConfigError, "pack_weights"):
        GenerationConfig(weights="int8", pack_weights=False)
