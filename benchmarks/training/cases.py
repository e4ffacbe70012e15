"""What the comparisons of training steps run on: random models of published shapes, sentences, noise; one folder a case.

Random weights: the speed of a step does not depend on them, and equality of gradients is no weaker with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import lmvae_fast as lf
from lmvae_fast.integrations.langvae import save_checkpoint

LATENT, MAX_LEN, VOCABULARY = 128, 32, 8000
BETA, TARGET_KL = 1.0, 2.0


@dataclass(frozen=True)
class Shape:
    """Layers, width and heads of decoder and encoder alike; rows of the decoder's embedding (None: the tokenizer's)."""

    layers: int
    width: int
    heads: int
    vocabulary: int | None


SHAPES = {"gpt2-small": Shape(12, 768, 12, 50_257), "4x256": Shape(4, 256, 4, None), "tiny": Shape(2, 32, 2, None)}


def make_case(folder: Path, name: str, lines: list[str], batch: int, threads: int) -> Path:
    """Write models, checkpoint, sentences and noise of a case below `folder`; returns its JSON file."""
    shape, folder = SHAPES[name], folder / f"{name}-{batch}"
    tokenizer = _tokenizer(lines)
    torch.manual_seed(0)
    rows = shape.vocabulary or len(tokenizer)
    decoder = GPT2Config(
        vocab_size=rows, n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, bos_token_id=0, eos_token_id=0
    )
    encoder = BertConfig(
        vocab_size=len(tokenizer), num_hidden_layers=shape.layers, hidden_size=shape.width,
        num_attention_heads=shape.heads, intermediate_size=4 * shape.width,
    )  # fmt: skip
    for part, model in (("decoder", GPT2LMHeadModel(decoder)), ("encoder", BertModel(encoder))):
        model.save_pretrained(folder / part)
        tokenizer.save_pretrained(folder / part)
    model = lf.LMVAE(
        lf.LMVAEConfig(
            encoder=str(folder / "encoder"), decoder=str(folder / "decoder"), latent_dim=LATENT, max_len=MAX_LEN
        )
    )
    sentences = lines[:batch]
    tokens = model.make_batch(model.tokenize(sentences), pooled=torch.zeros(batch, shape.width)).num_tokens
    save_file({"eps": torch.randn(batch, LATENT)}, folder / "noise.safetensors")
    case = {
        "shape": name, "batch": batch, "tokens": tokens, "flops": _flops(model, tokens, batch), "sentences": sentences,
        "checkpoint": str(save_checkpoint(model, folder / "checkpoint")), "noise": str(folder / "noise.safetensors"),
        "threads": threads, "beta": BETA, "target_kl": TARGET_KL, "learning_rate": 1e-3,
    }  # fmt: skip
    file = folder / "case.json"
    file.write_text(json.dumps(case))
    return file


def _tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    start, *others = special = ["<|endoftext|>", "[PAD]", "[CLS]", "[SEP]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    pad, cls, sep = others
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=start, bos_token=start, unk_token=start, pad_token=pad, cls_token=cls,
        sep_token=sep,
    )  # fmt: skip


def _flops(model: lf.LMVAE, tokens: int, batch: int) -> int:
    """Matrix products of one teacher-forced step: decoder forward and input gradients, head, projector.

    Attention's own products and all elementwise work are left out, so a share of the machine's rate is understated.
    """
    body = sum(p.numel() for name, p in model.decoder.body.named_parameters() if p.dim() == 2 and name.startswith("h."))
    projector = model.projector.weight.numel()
    return 4 * tokens * (body + model.decoder.head_weight.numel()) + 6 * batch * projector
