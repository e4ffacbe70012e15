"""Word vectors: a table of them, and the sources that make a vector of any word (an encoder, a decoder's embedding).

All answer `lookup(words)`, which names and counts the words that have none. Files are read by `word_vector_files.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lmvae_fast.data.dataset import DataReport, shorten
from lmvae_fast.errors import DataError
from lmvae_fast.files import replacing, write_tensors

ON_MISSING = ("error", "skip")
ON_DUPLICATE = ("error", "first")
KEYED_BY = ("word", "id")

#: How many missing words a message names.
WORDS_NAMED = 5


@dataclass(frozen=True)
class Lookup:
    """What `lookup` found of the words asked for.

    Attributes:
        vectors: float32 ``[n, dim]``, of the words found, in the order asked for.
        rows: for each vector, the position of its word among those asked for.
        missing: the words without a vector, each once, in the order asked for.
        skipped: how many of those asked for have none (repetitions counted).
    """

    vectors: np.ndarray
    rows: list[int]
    missing: list[str]
    skipped: int


class VectorSource(Protocol):
    """Whatever knows vectors of words.

    Attributes:
        source: where they come from: a path, a package, ``encoder`` or ``decoder``.
        keyed_by: ``word``, or ``id`` where a vector belongs to one sense (CODWOE's electra).
        dim: their width.
    """

    source: str
    keyed_by: str

    @property
    def dim(self) -> int: ...

    def lookup(self, words: Sequence[str], *, missing: str = "error") -> Lookup:
        """Vectors of words; raises DataError naming those that have none, or (``missing="skip"``) counts them."""

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of what decides the vectors."""


class WordVectors:
    """A table of word vectors.

    Args:
        words: the words (or whatever keys the vectors have).
        vectors: ``[words, dim]``, floating; a memory-mapped array is kept as it is.
        source: where they come from, for messages and reports.
        lowercase: the table knows lower case only (GloVe 6B): words asked for are lowered first.
        keyed_by: what `words` are: ``word``, or ``id`` of a definition.
        on_duplicate: a word that occurs twice: ``"error"`` raises, ``"first"`` keeps its first vector and counts the others.
        report: what happened to the rows on the way here.

    Raises:
        DataError: no word or no column, words and vectors of different number, a word twice, an empty word, a number that
            is NaN or infinite; it names the word.
    """

    def __init__(
        self,
        words: Sequence[str],
        vectors: Any,
        *,
        source: str = "memory",
        lowercase: bool = False,
        keyed_by: str = "word",
        on_duplicate: str = "error",
        report: DataReport | None = None,
    ):
        _check_choice("on_duplicate", on_duplicate, ON_DUPLICATE)
        _check_choice("keyed_by", keyed_by, KEYED_BY)
        words = checked_vocabulary(words, source)
        vectors = np.asanyarray(vectors)
        if vectors.ndim != 2 or vectors.shape[1] < 1 or not np.issubdtype(vectors.dtype, np.floating):
            raise DataError(
                f"{source}: word vectors must be a matrix of floating numbers", value=f"{vectors.dtype} {vectors.shape}",
                limit="[words, dim], dim >= 1",
            )  # fmt: skip
        if len(words) != len(vectors):
            raise DataError(
                f"{source}: words and vectors differ in number", value=f"{len(words)} words, {len(vectors)} vectors",
                remedy="give the vocabulary that belongs to these vectors",
            )  # fmt: skip
        if len(words) == 0:
            raise DataError(f"{source}: there are no word vectors", limit="at least one")
        self.source, self.lowercase, self.keyed_by = source, lowercase, keyed_by
        self.report = report or DataReport(source, read=len(words))
        self._row: dict[str, int] = {}
        kept: list[int] = []
        for row, word in enumerate(words):
            if not isinstance(word, str) or not word:
                raise DataError(
                    f"{source}, row {row}: a word must be a non-empty string",
                    value=shorten(repr(word)),
                    remedy="mend it",
                )
            if self._row.setdefault(word, row) == row:
                kept.append(row)
            elif on_duplicate == "error":
                raise DataError(
                    f"{source}: the word {word!r} occurs twice", value=f"rows {self._row[word]} and {row}",
                    remedy="remove one, or take the first with on_duplicate='first'",
                )  # fmt: skip
            else:
                self.report.drop("duplicate", f"row {row} ({word})")
        self.words: list[str] = [words[row] for row in kept]
        self.vectors = vectors if len(kept) == len(words) else vectors[kept]
        self._row = {word: row for row, word in enumerate(self.words)}
        self.report.kept = len(self.words)
        self._check_finite()
        self._fingerprint: str | None = None

    def _check_finite(self) -> None:
        for start in range(0, len(self.vectors), 1 << 16):  # in blocks: a memory-mapped table may be large
            bad = ~np.isfinite(self.vectors[start : start + (1 << 16)]).all(axis=1)
            if bad.any():
                row = start + int(bad.argmax())
                raise DataError(
                    f"{self.source}: the vector of {self.words[row]!r} holds NaN or infinity", value=f"row {row}",
                    limit="finite numbers", remedy="remove that row",
                )  # fmt: skip

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.vectors.shape[1]

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return isinstance(word, str) and self._key(word) in self._row

    def __getitem__(self, word: str) -> np.ndarray:
        """The vector of a word, float32 ``[dim]``; raises DataError when it has none."""
        return self.lookup([word]).vectors[0]

    def __repr__(self) -> str:
        return f"WordVectors({len(self)} words, dim {self.dim}, {self.source})"

    def _key(self, word: str) -> str:
        return word.lower() if self.lowercase else word

    def lookup(self, words: Sequence[str], *, missing: str = "error") -> Lookup:
        """Vectors of words, repetitions included.

        Raises DataError when a word has no vector (``missing="error"``), naming the first few and counting all; or, under
        ``"skip"``, when none has.
        """
        words = checked_words(words)
        _check_choice("missing", missing, ON_MISSING)
        places = [self._row.get(self._key(word)) for word in words]
        rows = [i for i, place in enumerate(places) if place is not None]
        absent = list(dict.fromkeys(word for word, place in zip(words, places, strict=True) if place is None))
        if absent and (missing == "error" or not rows):
            named = ", ".join(map(repr, absent[:WORDS_NAMED])) + (", ..." if len(absent) > WORDS_NAMED else "")
            raise DataError(
                f"{len(absent)} of {len(set(words))} words have no vector in {self.source}: {shorten(named, 200)}",
                limit=f"the {len(self)} words of the table" + (" (lower case)" if self.lowercase else ""),
                remedy="skip them with missing='skip', or take other vectors (the encoder's own have every word)",
            )  # fmt: skip
        vectors = np.asarray(self.vectors[[places[i] for i in rows]], dtype=np.float32)
        return Lookup(vectors.reshape(len(rows), self.dim), rows, absent, len(words) - len(rows))

    def select(self, words: Sequence[str]) -> WordVectors:
        """The table of these words alone (each once); raises DataError when one has no vector."""
        distinct = list(dict.fromkeys(map(self._key, words)))
        vectors = self.lookup(distinct).vectors
        return WordVectors(distinct, vectors, source=self.source, lowercase=self.lowercase, keyed_by=self.keyed_by)

    def joined(self, other: WordVectors) -> WordVectors:
        """This table and what another has beside it (the parts of a data set, say, each with the vectors of its own words).

        Raises DataError for tables of other widths or keys, and for a word with another vector in each.
        """
        ours, theirs = ((table.dim, table.keyed_by, table.lowercase) for table in (self, other))
        if ours != theirs:
            raise DataError(
                f"the word vectors of {self.source} and {other.source} are of other kinds",
                value=f"dim, keys, lower case {theirs}", limit=str(ours), remedy="take both from one source",
            )  # fmt: skip
        both = [word for word in other.words if word in self._row]
        for word in both:
            if not np.array_equal(self.vectors[self._row[word]], other.vectors[other._row[word]]):
                raise DataError(
                    f"the word {word!r} has another vector in each table", value=f"{self.source} and {other.source}",
                    remedy="take both from one source",
                )  # fmt: skip
        rows = [row for row, word in enumerate(other.words) if word not in self._row]
        words = [*self.words, *(other.words[row] for row in rows)]
        vectors = np.concatenate([self.vectors, other.vectors[rows]])
        return WordVectors(words, vectors, source=self.source, lowercase=self.lowercase, keyed_by=self.keyed_by)

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 over the words and their vectors as float32, in order."""
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps([self.words, self.dim, self.lowercase, self.keyed_by]).encode())
            for start in range(0, len(self.vectors), 1 << 16):
                block = np.ascontiguousarray(self.vectors[start : start + (1 << 16)], dtype="<f4")
                digest.update(block.data if block.size else b"")
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as safetensors (tensor ``vectors``, words in its metadata); `read_word_vectors` reads it back.

        Raises OutputError when the file cannot be written.
        """
        metadata = {
            "words": json.dumps(self.words), "source": self.source, "lowercase": json.dumps(self.lowercase),
            "keyed_by": self.keyed_by,
        }  # fmt: skip
        # A copy, since a mapped file cannot be written to; and in what torch has, which other byte orders are not.
        held = self.vectors.dtype.newbyteorder("=")
        vectors = np.array(self.vectors, dtype=held if held.itemsize <= 8 else np.float64, order="C")
        with replacing(Path(path)) as temporary:
            write_tensors(temporary, {"vectors": torch.from_numpy(vectors)}, metadata)


class EncoderVectors:
    """A text encoder's own vector of a word: what it pools of the word alone. Every word has one.

    encoder: an `lmvae_fast.Encoder` (or what tokenises and runs like one). batch_size: words per pass.
    """

    source, keyed_by = "encoder", "word"

    def __init__(self, encoder: Any, *, batch_size: int = 256):
        if not hasattr(encoder, "tokenize"):
            raise DataError(
                "this encoder reads no single words", value=type(encoder).__name__, limit="an lmvae_fast.Encoder",
                remedy="take other word vectors",
            )  # fmt: skip
        self.encoder, self.batch_size = encoder, batch_size

    @property
    def dim(self) -> int:
        """Width of the pooled vector."""
        return int(self.encoder.width)

    def lookup(self, words: Sequence[str], *, missing: str = "error") -> Lookup:
        """Vectors of words; none is missing."""
        import torch

        words = checked_words(words)
        _check_choice("missing", missing, ON_MISSING)
        distinct = list(dict.fromkeys(words))
        row = {word: i for i, word in enumerate(distinct)}
        parts = []
        with torch.no_grad():
            for start in range(0, len(distinct), self.batch_size):
                ids, mask = self.encoder.tokenize(distinct[start : start + self.batch_size])
                pooled = self.encoder(ids.to(self.encoder.device), mask.to(self.encoder.device))
                parts.append(pooled.float().cpu().numpy())
        vectors = np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)
        return Lookup(vectors[[row[word] for word in words]], list(range(len(words))), [], 0)

    def fingerprint(self) -> str:
        """That of the encoder."""
        return str(self.encoder.fingerprint())


class TokenEmbeddingVectors:
    """A decoder's token embedding as word vectors: the mean over the word's tokens. A word without tokens has none.

    decoder: an `lmvae_fast.Decoder`; the word is tokenised as it is within a sentence (after a space, where the model's
    tokenizer does so).
    """

    source, keyed_by = "decoder", "word"

    def __init__(self, decoder: Any):
        self.decoder = decoder

    @property
    def _weight(self) -> Any:
        return self.decoder.model.get_input_embeddings().weight.detach()

    @property
    def dim(self) -> int:
        """Width of the embedding."""
        return int(self._weight.shape[1])

    def lookup(self, words: Sequence[str], *, missing: str = "error") -> Lookup:
        """Vectors of words; raises DataError for a word that the tokenizer makes nothing of."""
        words = checked_words(words)
        _check_choice("missing", missing, ON_MISSING)
        pieces = self.decoder.tokenizer.encode(words)
        rows = [i for i, ids in enumerate(pieces) if ids]
        absent = list(dict.fromkeys(word for word, ids in zip(words, pieces, strict=True) if not ids))
        if absent and (missing == "error" or not rows):
            raise DataError(
                "the decoder's tokenizer makes no token of a word", value=", ".join(map(repr, absent[:WORDS_NAMED])),
                remedy="skip such words with missing='skip'",
            )  # fmt: skip
        weight = self._weight
        vectors = [weight[pieces[i]].float().mean(0).cpu().numpy() for i in rows]
        stacked = np.stack(vectors) if vectors else np.empty((0, self.dim), np.float32)
        return Lookup(stacked, rows, absent, len(words) - len(rows))

    def fingerprint(self) -> str:
        """SHA-256 over the embedding."""
        weight = self._weight.float().cpu().contiguous().numpy()
        return hashlib.sha256(weight.astype("<f4").tobytes()).hexdigest()


def checked_words(words: Iterable[Any]) -> list[str]:
    """The words as a list. Raises DataError for a single string, and for what is no non-empty string."""
    if isinstance(words, str):
        raise DataError("words must come as a list", value=repr(shorten(words)), remedy=f"wrap it: [{words[:40]!r}]")
    words = checked_vocabulary(words, "the words asked for")
    for i, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise DataError(f"word {i} is empty or no string", value=repr(word), remedy="remove it")
    return words


def checked_vocabulary(words: Any, source: str) -> list[Any]:
    """The words of a table as a list, which they come as. Raises DataError for a text, an object, and what holds no words."""
    if isinstance(words, (str, bytes, Mapping)) or not isinstance(words, Iterable):
        raise DataError(
            f"{source}: the words of word vectors come as a list", value=type(words).__name__, limit="a list of strings",
            remedy="give a word for each row, in the order of the rows",
        )  # fmt: skip
    return list(words)


def checked_source(vectors: Any) -> VectorSource:
    """What word vectors come from. Raises DataError for None, and for what cannot be asked for any (a name, a matrix)."""
    if vectors is None:
        raise DataError("there are no word vectors to look the words up in", remedy="give vectors=")
    if not callable(getattr(vectors, "lookup", None)):
        raise DataError(
            "word vectors cannot be looked up in this", value=shorten(f"{type(vectors).__name__} {vectors!r}"),
            limit="WordVectors, EncoderVectors or TokenEmbeddingVectors", remedy="read them with lf.read_word_vectors",
        )  # fmt: skip
    return vectors


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise DataError(f"unknown {name}", value=repr(value), limit=", ".join(allowed))
