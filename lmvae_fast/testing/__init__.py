"""Tiny random models, made in an instant and without a download: for tests, benchmarks and first tries.

``make_model("llama")`` is a whole LMVAE; ``tiny_decoder``, ``tiny_encoder`` and ``tiny_tokenizer`` are its Hugging Face parts.
"""

from lmvae_fast.testing.models import make_decoder, make_model
from lmvae_fast.testing.parts import (
    FAMILIES,
    HIDDEN,
    SENTENCES,
    SPECIAL,
    VOCABULARY,
    WINDOWED,
    memory_shape,
    perturbed,
    tiny_decoder,
    tiny_encoder,
    tiny_tokenizer,
)

__all__ = [
    "FAMILIES",
    "HIDDEN",
    "SENTENCES",
    "SPECIAL",
    "VOCABULARY",
    "WINDOWED",
    "make_decoder",
    "make_model",
    "memory_shape",
    "perturbed",
    "tiny_decoder",
    "tiny_encoder",
    "tiny_tokenizer",
]
