"""A decoder made and trained on the spot."""

from __future__ import annotations

import lmvae_fast as lf
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.testing import tiny_encoder, tiny_tokenizer
from lmvae_fast.training.language_model import make_decoder, train_language_model

TEXTS = [f"a {a} is a kind of {b}" for a in ("cat", "dog", "bee", "ant") for b in ("animal", "thing")] * 8


def test_a_decoder_learns_its_sentences_and_is_left_frozen(tmp_path):
    make_decoder(tmp_path / "words", TEXTS, layers=1, width=32, heads=2)
    make_decoder(tmp_path / "bpe", TEXTS, layers=1, width=32, heads=2, vocabulary=300)
    for name in ("words", "bpe"):
        config = lf.LMVAEConfig(encoder="unused", decoder=str(tmp_path / name), latent_dim=4, max_len=12)
        model = lf.LMVAE(config, encoder=Encoder(tiny_encoder("bert", vocab_size=320), tiny_tokenizer()))
        sentences = model.tokenize(TEXTS)
        assert sentences.texts == TEXTS and sentences.report["truncated"] == 0
        before = model.trainable_state_dict()
        losses = train_language_model(model, sentences, epochs=12, batch_size=16, learning_rate=1e-2)
        assert losses[-1] < 0.5 * losses[0]
        assert not any(value.requires_grad for value in model.decoder.parameters())
        assert all((model.trainable_state_dict()[key] == value).all() for key, value in before.items())
