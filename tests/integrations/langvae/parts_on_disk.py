"""Folders of tiny encoders and decoders with their tokenizers, as scripts name them."""

from __future__ import annotations

from pathlib import Path

from lmvae_fast.integrations.langvae import LangVAE, SentenceDecoder, SentenceEncoder, VAEConfig
from lmvae_fast.testing import tiny_decoder, tiny_encoder, tiny_tokenizer

NZ, MAX_LEN = 4, 8


def write_parts(root: Path) -> Path:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    for name, model in (
        ("bert", tiny_encoder("bert", vocab_size=size)),
        ("gpt2", tiny_decoder("gpt2", layers=2, vocab_size=size)),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def build(root: Path, *, conditional: bool = False, caching: bool = True, **options) -> LangVAE:
    decoder = SentenceDecoder(str(root / "gpt2"), NZ, MAX_LEN, conditional)
    encoder = SentenceEncoder(str(root / "bert"), NZ, decoder.tokenizer, caching=caching)
    return LangVAE(VAEConfig(latent_dim=NZ), encoder, decoder, **options)
