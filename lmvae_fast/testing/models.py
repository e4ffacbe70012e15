"""Whole tiny models around the random parts of ``testing/parts.py``."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.parts import tuning_of
from lmvae_fast.models.systems import resolve
from lmvae_fast.reference.precision import double_precision
from lmvae_fast.testing.parts import tiny_decoder, tiny_encoder, tiny_tokenizer
from lmvae_fast.text.tokenizer import SentenceTokenizer


def make_decoder(
    family: str = "gpt2",
    *,
    dtype: torch.dtype = torch.float32,
    train: bool = False,
    tuning: Any = None,
    **options: Any,
) -> tuple[PreTrainedModel, Decoder]:
    """A random Hugging Face model of ``tiny_tokenizer``'s vocabulary, and the Decoder around it.

    Args:
        train, tuning: as Decoder takes them. options: of ``tiny_decoder``.
    """
    tokenizer = tiny_tokenizer()
    model: Any = tiny_decoder(family, **{"vocab_size": len(tokenizer), **options})
    # Hugging Face's norms and eager attention work in fp32 inside, whatever the dtype of the weights.
    model = double_precision(model) if dtype == torch.float64 else model.to(dtype)
    return model, Decoder(model, SentenceTokenizer(tokenizer), train=train, tuning=tuning)


def make_model(
    family: str = "gpt2",
    encoder: str = "bert",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int | None = None,
    **config: Any,
) -> LMVAE:
    """A whole LMVAE of tiny random parts: latent_dim 6, max_len 9.

    Args:
        family: of the decoder (``FAMILIES``). encoder: "bert", "t5" or "qwen2"; of no meaning for ``system="cvae"``.
        seed: of what trains (posterior head and projector). layers: of the decoder, in place of ``tiny_decoder``'s.
        config: fields of LMVAEConfig, in place of the defaults.
    """
    torch.manual_seed(seed)
    fields: dict[str, Any] = {"latent_dim": 6, "max_len": 9, "dtype": str(dtype).removeprefix("torch."), **config}
    short = LMVAEConfig(**fields)
    full = resolve(short)
    size = {} if layers is None else {"layers": layers}
    _, decoder = make_decoder(family, dtype=dtype, train=bool(full.train_decoder), tuning=tuning_of(full), **size)
    if full.prompted:
        model = LMVAE(short, decoder=decoder)
        with torch.no_grad():  # it begins at the prior, where nothing of a sentence shows
            model.posterior_head.out.weight.normal_(std=0.2)
        return model
    tokenizer = tiny_tokenizer()
    text_encoder: Any = tiny_encoder(encoder, vocab_size=len(tokenizer))
    part = Encoder(
        text_encoder.to(dtype), tokenizer, pooling=str(full.pooling),
        normalize=bool(full.normalize), train=bool(full.train_encoder),
        segments=full.pooling_segments, layer=full.encoder_layer,
    )  # fmt: skip
    return LMVAE(short, encoder=part, decoder=decoder)
