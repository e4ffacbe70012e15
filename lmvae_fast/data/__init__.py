"""Sentences: reading them from files, holding them, and generating the bundled corpus."""

from lmvae_fast.data.corpus import FACTORS, corpus_size, generate_corpus
from lmvae_fast.data.dataset import DataReport, Example, SentenceDataset
from lmvae_fast.data.readers import read

__all__ = [
    "FACTORS",
    "DataReport",
    "Example",
    "SentenceDataset",
    "corpus_size",
    "generate_corpus",
    "read",
]
