"""Quantised decoders are right, or refused for what their weights really do: bitsandbytes, torchao, and a stand-in for both."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

import lmvae_fast as lf
from lmvae_fast.errors import ConfigError, UnsupportedDecoderError
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.testing import tiny_encoder, tiny_tokenizer
from lmvae_fast.testing.family_check import check_decoder, wrong
from lmvae_fast.text.tokenizer import SentenceTokenizer

GRADIENTLESS = "lets no gradient through to the memory"


class Rounded(nn.Module):
    """A linear layer of 8 bits; ``passes``: whether a gradient comes through, as in kernels made for inference it does not."""

    def __init__(self, linear: nn.Linear, passes: bool):
        super().__init__()
        self.passes = passes
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(self.passes and torch.is_grad_enabled()):
            return x @ (self.codes.to(x.dtype) * self.scale).t()


def llama() -> hf.LlamaForCausalLM:
    config = hf.LlamaConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def quantised(folder, config, dtype=torch.float32):
    return hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map="cpu")


def exchanged(passes: bool, *, layers: tuple[int, ...]) -> hf.LlamaForCausalLM:
    model = llama()
    for index in layers:
        attention = model.model.layers[index].self_attn
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(attention, name, Rounded(getattr(attention, name), passes))
    return model


def test_rounded_weights_that_pass_gradients_are_right():
    found = check_decoder(exchanged(True, layers=(0, 1)))
    assert wrong(found) == [], found


@pytest.mark.parametrize("layers", [(0, 1), (1,)], ids=str)
def test_rounded_weights_that_pass_none_are_refused(layers):
    with pytest.raises(UnsupportedDecoderError, match=GRADIENTLESS) as refusal:
        Decoder(exchanged(False, layers=layers), SentenceTokenizer(tiny_tokenizer()))
    assert refusal.value.value == f"layers {list(layers)}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitsandbytes_of_8_bits_is_right(folder, dtype):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = quantised(folder, hf.BitsAndBytesConfig(load_in_8bit=True), dtype)
    assert "Linear8bitLt" in {type(module).__name__ for module in model.modules()}
    if dtype == torch.float32:
        found = check_decoder(model)
        assert wrong(found) == [], found
    else:
        Decoder(model, SentenceTokenizer(tiny_tokenizer()))


def test_bitsandbytes_of_4_bits_is_right_or_refused_for_its_gradient(folder):
    """On CPUs with AVX512-BF16 it packs weights for a kernel without a backward, unless it is told not to."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    config = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = quantised(folder, config)
    if functional.has_avx512bf16():
        with pytest.raises(UnsupportedDecoderError, match=GRADIENTLESS):
            Decoder(model, SentenceTokenizer(tiny_tokenizer()))
    model = quantised(folder, config)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    found = check_decoder(model)
    assert wrong(found) == [], found


def test_torchao_weights_of_8_bits_are_right(folder):
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    found = check_decoder(quantised(folder, hf.TorchAoConfig(ao.Int8WeightOnlyConfig())))
    assert wrong(found) == [], found


def test_torchao_activations_of_8_bits_are_refused_for_their_gradient(folder):
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = quantised(folder, hf.TorchAoConfig(ao.Int8DynamicActivationInt8WeightConfig()))
    with pytest.raises(UnsupportedDecoderError, match=GRADIENTLESS):
        Decoder(model, SentenceTokenizer(tiny_tokenizer()))


def test_rounded_weights_are_left_as_they_are_in_decoding():
    """They are not packed as if they were whole ones; `weights="int8"` is refused, since there is nothing to round."""
    tokenizer = tiny_tokenizer()
    config = lf.LMVAEConfig(latent_dim=4, max_len=8)
    encoder = Encoder(tiny_encoder("bert", vocab_size=len(tokenizer)), tokenizer)
    decoder = Decoder(exchanged(True, layers=(0, 1)), SentenceTokenizer(tokenizer))
    model = lf.LMVAE(config, encoder=encoder, decoder=decoder).eval()
    z = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    texts = model.decode(z)
    with lf.backend("reference"):
        assert model.decode(z) == texts
    decoder.model.is_quantized = True
    with pytest.raises(ConfigError, match="quantised already"):
        list(lf.generate(model, z, lf.GenerationConfig(weights="int8")))


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_a_model_with_a_decoder_of_8_bits_trains_decodes_and_is_saved(folder, tmp_path, package):
    pytest.importorskip(package, reason=f"{package} is not installed")
    tokenizer = tiny_tokenizer()
    if package == "bitsandbytes":
        method = hf.BitsAndBytesConfig(load_in_8bit=True)
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        method = hf.TorchAoConfig(Int8WeightOnlyConfig())
    quantised(folder, method).save_pretrained(tmp_path / "int8")
    tokenizer.save_pretrained(tmp_path / "int8")
    tiny_encoder("bert", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    config = lf.LMVAEConfig(encoder=str(tmp_path / "encoder"), decoder=str(tmp_path / "int8"), latent_dim=4, max_len=8)
    model = lf.LMVAE(config)
    model.train()(["a cat is an animal", "the sun"]).loss.backward()
    assert float(model.posterior_head.weight.grad.abs().sum()) > 0
    z = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    texts = model.eval().decode(z)
    model.save_pretrained(tmp_path / "model", include_frozen=False)
    assert lf.LMVAE.from_pretrained(tmp_path / "model").decode(z) == texts
    model.save_pretrained(tmp_path / "whole")
    assert lf.LMVAE.from_pretrained(tmp_path / "whole").decode(z) == texts
