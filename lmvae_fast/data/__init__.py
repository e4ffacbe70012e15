"""Sentences, prompts with responses, definitions and word vectors: reading them from files, holding them, and generating the
bundled corpus."""

from lmvae_fast.data.corpus import FACTORS, corpus_size, generate_corpus
from lmvae_fast.data.dataset import DataReport, Example, SentenceDataset
from lmvae_fast.data.definitions import Definition, DefinitionDataset, read_definitions
from lmvae_fast.data.prompt_cutting import cut_texts
from lmvae_fast.data.prompt_readers import LENGTHS, read_prompts, read_texts
from lmvae_fast.data.prompts import PromptDataset, PromptResponse
from lmvae_fast.data.readers import read
from lmvae_fast.data.word_vector_files import read_word_vectors
from lmvae_fast.data.word_vectors import EncoderVectors, TokenEmbeddingVectors, WordVectors

__all__ = [
    "FACTORS",
    "LENGTHS",
    "DataReport",
    "Definition",
    "DefinitionDataset",
    "EncoderVectors",
    "Example",
    "PromptDataset",
    "PromptResponse",
    "SentenceDataset",
    "TokenEmbeddingVectors",
    "WordVectors",
    "corpus_size",
    "cut_texts",
    "generate_corpus",
    "read",
    "read_definitions",
    "read_prompts",
    "read_texts",
    "read_word_vectors",
]
