"""Sentences as bags of words that have vectors."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lmvae_fast.data.word_vectors import VectorSource, WordVectors
from lmvae_fast.errors import DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.results import Array


class KnownWords:
    """Vectors of words, looked up once each.

    Args:
        vectors: a mapping word -> vector, or whatever answers ``lookup`` (``lmvae_fast.read_word_vectors("glove")``, an
            encoder's or a decoder's own vectors).
        unit: scale each vector to length one (a zero vector stays).

    A word without a vector is tried without the punctuation around it, then dropped; a source that makes a vector of any
    word is asked without that punctuation at once.
    """

    def __init__(self, vectors: Mapping[str, Any] | VectorSource, *, unit: bool = False):
        source: Any = vectors
        if isinstance(vectors, Mapping) and vectors:
            matrix = checks.latents(list(vectors.values()), name="vectors")
            source = WordVectors(list(vectors), matrix, source="given")
        if not hasattr(source, "lookup"):
            raise DataError(
                "word vectors must be a mapping of words to vectors, or a table of them", value=type(vectors).__name__,
                remedy='give a dict, or lmvae_fast.read_word_vectors("glove")',
            )  # fmt: skip
        self.source: VectorSource = source
        self.unit = unit
        self._row: dict[str, int | None] = {}  # of words as they stand in sentences
        self._form: dict[str, int] = {}  # of words as the source was asked for them
        self._vectors: list[Array] = []

    @property
    def name(self) -> str:
        """Where the vectors come from."""
        return self.source.source

    def learn(self, words: Iterable[str]) -> None:
        """Look up the words not seen yet, in as few calls as can be."""
        new = [word for word in dict.fromkeys(words) if word not in self._row]
        form = {word: word.strip(string.punctuation) or word for word in new}
        if hasattr(self.source, "__contains__"):
            form = {word: word if word in self.source else bare for word, bare in form.items()}
            form = {word: found for word, found in form.items() if found in self.source}
        self._look_up([found for found in dict.fromkeys(form.values()) if found not in self._form])
        self._row |= {word: self._form.get(form.get(word, "")) for word in new}

    def _look_up(self, forms: Sequence[str]) -> None:
        if not forms:
            return
        found = self.source.lookup(forms, missing="skip")
        for row, vector in zip(found.rows, found.vectors, strict=True):
            wide = vector.astype(np.float64)
            length = float(np.linalg.norm(wide)) if self.unit else 0.0
            self._form[forms[row]] = len(self._vectors)
            self._vectors.append(wide / length if length > 0.0 else wide)

    def bag(self, text: str | Sequence[str], stop_words: Collection[str] = ()) -> Counter[int]:
        """How often each known word occurs in a sentence (lower-cased, split at white space) or a list of words."""
        words = text.lower().split() if isinstance(text, str) else list(text)
        left_out = set(stop_words)
        words = [word for word in words if word not in left_out]
        self.learn(words)
        rows = (self._row[word] for word in words)
        return Counter(row for row in rows if row is not None)

    def points(self, bag: Counter[int]) -> tuple[Array, Array]:
        """Vectors ``[m, D]`` of a bag's words and their shares ``[m]``."""
        mass = np.fromiter(bag.values(), dtype=np.float64)
        return np.stack([self._vectors[row] for row in bag]), mass / mass.sum()
