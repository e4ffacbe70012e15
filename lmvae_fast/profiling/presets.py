"""Shapes of published encoders and decoders, so that their cost can be counted, and random ones built, without a download.

Facts from the models' published configuration files, in the words of Hugging Face's configuration classes. Only what
shapes depend on is here: no weights, no tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.errors import ConfigError
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.systems import resolve
from lmvae_fast.text.tokenizer import SentenceTokenizer
from lmvae_fast.training.language_model import make_tokenizer

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}

ENCODERS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "bert", "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    "bert-base-cased": {
        "model_type": "bert", "vocab_size": 28996, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072,
    },
    "flan-t5-base": {
        "model_type": "t5", "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12,
        "num_heads": 12, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
    "sentence-t5-base": {
        "model_type": "t5", "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12,
        "num_heads": 12, "feed_forward_proj": "relu",
    },
    "stella-1.5b": {
        "model_type": "qwen2", "vocab_size": 151646, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    },
}  # fmt: skip

DECODERS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "gpt2", "vocab_size": 512, "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 128,
        "bos_token_id": 0, "eos_token_id": 0,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 50257, "n_layer": 12, "n_embd": 768, "n_head": 12},
    "qwen2.5-3b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
    "mistral-7b-v0.3": {
        "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None,
    },
    "llama-7b": {
        **_LLAMA, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "llama3-8b": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip


def preset_config(name: str, presets: dict[str, dict[str, Any]]) -> PretrainedConfig:
    """The configuration of a preset in ENCODERS or DECODERS; ConfigError for a name that is none."""
    if name not in presets:
        raise ConfigError("unknown preset", value=name, limit=", ".join(presets), remedy="choose one of these")
    fields = dict(presets[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def build_encoder(name: str, device: torch.device | str = "meta") -> PreTrainedModel:
    """An encoder of a preset's shape with random weights (none on the meta device), float32."""
    config = preset_config(name, ENCODERS)
    with torch.device(device):
        return T5EncoderModel(config) if isinstance(config, T5Config) else AutoModel.from_config(config)


def build_decoder(name: str, device: torch.device | str = "meta") -> PreTrainedModel:
    """A causal language model of a preset's shape with random weights (none on the meta device), float32."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(preset_config(name, DECODERS))


def random_model(
    encoder: str, decoder: str, config: LMVAEConfig, texts: Sequence[str], *, device: torch.device | str = "cpu"
) -> LMVAE:
    """A whole model of two presets' shapes with random weights, for timing: speed does not depend on the weights.

    ``config`` says all but the two models (its names of them are replaced). Both models read a byte-level BPE made from
    ``texts``, which uses a part of their vocabularies. Raises ConfigError for an unknown preset.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = build_encoder(encoder, device), build_decoder(decoder, device)
    return assembled(*models, config.replace(encoder=encoder, decoder=decoder), texts)


def assembled(encoder: PreTrainedModel, decoder: PreTrainedModel, config: LMVAEConfig, texts: Sequence[str]) -> LMVAE:
    """A whole model of two that are in memory, both reading a byte-level BPE made from ``texts``."""
    full = resolve(config)
    dtype = getattr(torch, full.dtype)
    tokenizer = make_tokenizer(texts, min(encoder.config.vocab_size, decoder.config.vocab_size, 8000))
    return LMVAE(
        full,
        encoder=Encoder(
            encoder.to(dtype), tokenizer, pooling=str(full.pooling), normalize=bool(full.normalize),
            train=bool(full.train_encoder),
        ),
        decoder=Decoder(decoder.to(dtype), SentenceTokenizer(tokenizer), train=bool(full.train_decoder)),
    )  # fmt: skip
