"""Sentences, and prompts with responses: reading them from files, holding them, and generating the bundled corpus."""

from lmvae_fast.data.corpus import FACTORS, corpus_size, generate_corpus
from lmvae_fast.data.dataset import DataReport, Example, SentenceDataset
from lmvae_fast.data.prompt_cutting import cut_texts
from lmvae_fast.data.prompt_readers import LENGTHS, read_prompts, read_texts
from lmvae_fast.data.prompts import PromptDataset, PromptResponse
from lmvae_fast.data.readers import read

__all__ = [
    "FACTORS",
    "LENGTHS",
    "DataReport",
    "Example",
    "PromptDataset",
    "PromptResponse",
    "SentenceDataset",
    "corpus_size",
    "cut_texts",
    "generate_corpus",
    "read",
    "read_prompts",
    "read_texts",
]
