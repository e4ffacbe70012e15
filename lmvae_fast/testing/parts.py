"""Tiny random models of every decoder family, three encoders and a tokenizer: deterministic, no download.

Weights are drawn large, and norms and biases are perturbed, so that a wrong mask, position or scale shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

FAMILIES = ("gpt2", "llama", "gemma2", "gemma3", "qwen2", "qwen3", "mistral", "phi3", "gpt_neox", "opt")
MORE_FAMILIES = ("gemma",)  # for tests of what is written out for them
WINDOWED = ("gemma2", "gemma3", "mistral", "phi3", "qwen2", "qwen3")
VOCABULARY, HIDDEN = 101, 32
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tiny_decoder(
    family: str,
    *,
    layers: int = 3,
    vocab_size: int = VOCABULARY,
    window: int | None = None,
    seed: int = 0,
    attention: str = "eager",
    max_positions: int = 128,
) -> hf.PreTrainedModel:
    """A random causal LM in eval mode, fp32, hidden size 32, GQA 4:2 where the family has it.

    Args:
        family: one of ``FAMILIES``.
        layers, vocab_size, max_positions: sizes. seed: of the weights.
        attention: transformers' name of the attention implementation.
        window: sliding window in cache entries (families in ``WINDOWED``); None leaves full attention, except that
            Gemma2 and Gemma3, which always alternate, then get a window of 4096.

    Raises:
        ValueError: an unknown family, or a window for one that has none.
    """
    if family not in (*FAMILIES, *MORE_FAMILIES):
        raise ValueError(f"family {family!r} is none of {(*FAMILIES, *MORE_FAMILIES)}")
    if window is not None and family not in WINDOWED:
        raise ValueError(f"family {family!r} has no sliding window; those that do: {WINDOWED}")
    common: dict[str, Any] = dict(
        vocab_size=vocab_size, num_hidden_layers=layers, attn_implementation=attention, **SPECIAL
    )
    rotary: dict[str, Any] = dict(
        hidden_size=HIDDEN, intermediate_size=48, num_attention_heads=4, max_position_embeddings=max_positions, **common
    )
    gqa: dict[str, Any] = dict(num_key_value_heads=2, **rotary)
    # Odd layers slide, even ones see everything: both kinds in one model.
    types = ["sliding_attention" if i % 2 else "full_attention" for i in range(layers)]
    gemma: dict[str, Any] = dict(
        head_dim=8, sliding_window=window or 4096, layer_types=types, query_pre_attn_scalar=12, **gqa
    )
    qwen: dict[str, Any] = (
        dict(use_sliding_window=True, sliding_window=window, layer_types=types, **gqa) if window else gqa
    )
    config = {
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=vocab_size, n_layer=layers, n_embd=HIDDEN, n_head=4, n_positions=max_positions,
            **(SPECIAL | {"attn_implementation": attention}),
        ),
        "llama": lambda: hf.LlamaConfig(**gqa),
        "gemma": lambda: hf.GemmaConfig(head_dim=8, **gqa),
        "gemma2": lambda: hf.Gemma2Config(attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **gemma),
        "gemma3": lambda: hf.Gemma3TextConfig(**gemma),
        "qwen2": lambda: hf.Qwen2Config(**qwen),
        "qwen3": lambda: hf.Qwen3Config(head_dim=8, **qwen),
        "mistral": lambda: hf.MistralConfig(head_dim=8, sliding_window=window, **gqa),
        "phi3": lambda: hf.Phi3Config(sliding_window=window, **gqa),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**rotary),
        "opt": lambda: hf.OPTConfig(
            hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, ffn_dim=48, num_attention_heads=4,
            max_position_embeddings=max_positions, **common,
        ),
    }[family]()  # fmt: skip
    return perturbed(lambda: hf.AutoModelForCausalLM.from_config(config), seed)


def tiny_encoder(family: str = "bert", *, vocab_size: int = VOCABULARY, seed: int = 1) -> hf.PreTrainedModel:
    """A random text encoder in eval mode, fp32, hidden size 24: ``bert``, ``t5`` or ``qwen2`` (no other: KeyError)."""
    common: dict[str, Any] = dict(vocab_size=vocab_size, **SPECIAL)
    build = {
        "bert": lambda: hf.BertModel(
            hf.BertConfig(
                hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=vocab_size
            )
        ),
        "t5": lambda: hf.T5EncoderModel(
            hf.T5Config(d_model=24, d_kv=12, d_ff=40, num_layers=2, num_heads=2, vocab_size=vocab_size)
        ),
        "qwen2": lambda: hf.Qwen2Model(
            hf.Qwen2Config(
                hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, **common,
            )
        ),
    }[family]  # fmt: skip
    return perturbed(build, seed)


def perturbed(build: Callable[[], hf.PreTrainedModel], seed: int) -> hf.PreTrainedModel:
    """Result of ``build()`` under a seed of its own, weights drawn anew: matrices N(0, 0.3^2), vectors moved by N(0, 0.1^2)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def memory_shape(model: hf.PreTrainedModel, batch: int, slots: int) -> tuple[int, ...]:
    """Shape of a decoder's memory: ``(layers, 2, batch, kv_heads, slots, head_dim)``."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, 2, batch, kv_heads, slots, head_dim


SENTENCES = (
    "a cat is a kind of animal", "the sun is a star", "water is a kind of liquid", "plants need light to grow",
    "an animal needs food to live", "ice is water as a solid", "a stone is an object", "the moon moves around a planet",
)  # fmt: skip


@functools.cache
def _trained_tokenizer() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    special = ["[PAD]", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return bpe.to_str()


def tiny_tokenizer() -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 320 tokens with pad 0, bos 1, eos 2; ``len()`` gives its size."""
    from tokenizers import Tokenizer

    return hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()), pad_token="[PAD]", bos_token="<s>", eos_token="</s>"
    )
