"""Cases that both sides of a comparison run on: random models of published shapes, sentences, noise; one folder a case.

Random weights: the speed of a step does not depend on them, and equality of gradients is no weaker with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

import lmvae_fast as lf
from lmvae_fast.integrations.langvae import save_checkpoint

LATENT, MAX_LEN, VOCABULARY = 128, 32, 8000
BETA, TARGET_KL = 1.0, 2.0


@dataclass(frozen=True)
class Shape:
    """Layers, width and heads of decoder and encoder alike; rows of the decoder's embedding (None: the tokenizer's).

    ``family`` of the decoder, by Hugging Face's name of it; where it is no GPT-2, its ``kv_heads``, the ``inner`` width of
    its MLP, and whether embedding and head are one matrix.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int | None
    family: str = "gpt2"
    kv_heads: int = 0
    inner: int = 0
    tied: bool = True

    def decoder(self, vocabulary: int) -> PretrainedConfig:
        """Configuration of the decoder."""
        ends = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0}
        if self.family == "gpt2":
            return GPT2Config(n_layer=self.layers, n_embd=self.width, n_head=self.heads, **ends)
        return AutoConfig.for_model(
            self.family, hidden_size=self.width, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, intermediate_size=self.inner, tie_word_embeddings=self.tied,
            max_position_embeddings=1024, **ends,
        )  # fmt: skip


SHAPES = {
    "gpt2-small": Shape(12, 768, 12, 50_257),
    "4x256": Shape(4, 256, 4, None),
    "tiny": Shape(2, 32, 2, None),
    # as JackFram/llama-160m is; and a tenth of a billion in Qwen2.5's proportions, most of it its vocabulary
    "llama-160m": Shape(12, 768, 12, 32_000, "llama", 12, 3072, tied=False),
    "smollm2-135m": Shape(30, 576, 9, 49_152, "llama", 3, 1536),
    "qwen-0.1b": Shape(12, 512, 8, 151_936, "qwen2", 2, 1408),
    "tiny-llama": Shape(2, 32, 2, None, "llama", 1, 64, tied=False),
}


def make_decoder_case(folder: Path, name: str, lines: list[str]) -> Path:
    """Write a random decoder of a shape and a tokenizer made from ``lines`` below `folder`; returns their folder."""
    shape, folder = SHAPES[name], folder / name / "decoder"
    tokenizer = _tokenizer(lines)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape.decoder(shape.vocabulary or len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_case(folder: Path, name: str, lines: list[str], batch: int, threads: int) -> Path:
    """Write models, checkpoint, sentences and noise of a case below `folder`; returns its JSON file."""
    shape, folder = SHAPES[name], folder / f"{name}-{batch}"
    tokenizer = _tokenizer(lines)
    torch.manual_seed(0)
    rows = shape.vocabulary or len(tokenizer)
    decoder = AutoModelForCausalLM.from_config(shape.decoder(rows))
    encoder = BertConfig(
        vocab_size=len(tokenizer), num_hidden_layers=shape.layers, hidden_size=shape.width,
        num_attention_heads=shape.heads, intermediate_size=4 * shape.width,
    )  # fmt: skip
    for part, model in (("decoder", decoder), ("encoder", BertModel(encoder))):
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
    layers = (p for name, p in model.decoder.body.named_parameters() if name.startswith(("h.", "layers.")))
    body = sum(p.numel() for p in layers if p.dim() == 2)
    projector = model.projector.weight.numel()
    return 4 * tokens * (body + model.decoder.head_weight.numel()) + 6 * batch * projector
