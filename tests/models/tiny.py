"""Tiny models of ours around the random ones of tests/reference/tiny.py."""

from __future__ import annotations

import torch

import tests.reference.tiny as tiny
from lmvae_fast.config import LMVAEConfig
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.parts import tuning_of
from lmvae_fast.reference.precision import double_precision
from lmvae_fast.text.tokenizer import SentenceTokenizer


def make_decoder(family="gpt2", *, dtype=torch.float32, train=False, tuning=None, **options):
    """(Hugging Face model, Decoder around it)."""
    tokenizer = tiny.tiny_tokenizer()
    model = tiny.tiny_decoder(family, **{"vocab_size": len(tokenizer), **options})
    # Hugging Face's norms and eager attention work in fp32 inside, whatever the dtype of the weights.
    model = double_precision(model) if dtype == torch.float64 else model.to(dtype)
    return model, Decoder(model, SentenceTokenizer(tokenizer), train=train, tuning=tuning)


def make_model(family="gpt2", encoder="bert", *, dtype=torch.float32, seed=0, **config):
    """A whole LMVAE on tiny parts; keyword arguments are LMVAEConfig's fields."""
    torch.manual_seed(seed)
    config = LMVAEConfig(**{"latent_dim": 6, "max_len": 9, "dtype": str(dtype).removeprefix("torch."), **config})
    from lmvae_fast.models.systems import resolve

    full = resolve(config)
    _, decoder = make_decoder(family, dtype=dtype, train=full.train_decoder, tuning=tuning_of(full))
    part = Encoder(
        tiny.tiny_encoder(encoder, vocab_size=len(tiny.tiny_tokenizer())).to(dtype), tiny.tiny_tokenizer(),
        pooling=full.pooling, normalize=full.normalize,
        train=full.train_encoder,
    )  # fmt: skip
    return LMVAE(config, encoder=part, decoder=decoder)
