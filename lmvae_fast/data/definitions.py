"""Definition data: words with their glosses, read from CODWOE's JSON or a table, and parted so that no word is in two parts.

A word with several glosses is several pairs: definition modelling then sees one word vector with several targets.
CODWOE: SemEval 2022 task 1 (Mickus et al., "Comparing dictionaries and word embeddings").
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, overload

import numpy as np

from lmvae_fast.data.dataset import DataReport, SentenceDataset, check_options, shorten
from lmvae_fast.data.lines import one_line
from lmvae_fast.data.not_rows import refuse_for_rows
from lmvae_fast.data.readers import field_names, placed_rows
from lmvae_fast.data.stable_random import shuffled
from lmvae_fast.data.word_vector_files import read_json_list
from lmvae_fast.data.word_vectors import VectorSource, checked_source
from lmvae_fast.errors import DataError, shown

#: Column names taken when the caller names none, in this order.
WORD_COLUMNS = ("word", "lemma", "term", "definiendum")
GLOSS_COLUMNS = ("definition", "gloss", "definiens")
POS_COLUMNS = ("pos",)


@dataclass(frozen=True)
class Definition:
    """One word with one of its glosses.

    Attributes:
        word: the word; not empty.
        gloss: its definition; not empty.
        pos: part of speech, or None.
        key: the pair's own name (CODWOE's id), which vectors of senses go by, or None.
    """

    word: str
    gloss: str
    pos: str | None = None
    key: str | None = None

    @property
    def text(self) -> str:
        """The gloss, under the name that a model tokenises."""
        return self.gloss


class DefinitionDataset(Sequence[Definition]):
    """A sequence of :class:`Definition`, stored by column.

    Attributes:
        words, glosses: of each pair, words without blanks around them. pos, keys: likewise, or None when no pair has one.
        report: what was kept and dropped on the way here.
        words_known: False when the file hides the words (CODWOE's training files) and `words` holds ids instead.

    Raises DataError when columns differ in length, and for an empty word or gloss, naming the pair.
    """

    def __init__(
        self,
        words: Sequence[str],
        glosses: Sequence[str],
        pos: Sequence[str | None] | None = None,
        keys: Sequence[str | None] | None = None,
        report: DataReport | None = None,
        *,
        words_known: bool = True,
    ):
        for name, column in (("glosses", glosses), ("pos", pos), ("keys", keys)):
            if column is not None and len(column) != len(words):
                raise DataError(f"{name} and words differ in number", value=len(column), limit=len(words))
        for i, (word, gloss) in enumerate(zip(words, glosses, strict=True)):
            for name, value in (("word", word), ("gloss", gloss)):
                if not isinstance(value, str) or not value.strip():
                    raise DataError(
                        f"the {name} of pair {i} is empty", value=f"word {word!r}, gloss {shorten(repr(gloss))}",
                        remedy="drop it, or read with on_empty='drop'",
                    )  # fmt: skip
        self.words: list[str] = [word.strip() for word in words]  # "cat " is no other word, in a split say
        self.glosses: list[str] = list(glosses)
        self.pos = None if pos is None or all(p is None for p in pos) else list(pos)
        self.keys = None if keys is None or all(k is None for k in keys) else list(keys)
        self.report = report or DataReport("memory", read=len(self.words), kept=len(self.words))
        self.words_known = words_known

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[str, str] | Definition], *, on_empty: str = "error") -> DefinitionDataset:
        """Collect (word, gloss) pairs; each may go on with a part of speech and a key.

        on_empty: an empty word or gloss: ``"error"`` raises DataError, ``"drop"`` counts it in the report.
        """
        check_options(on_empty, None)
        refuse_for_rows(pairs, "DefinitionDataset.from_pairs", reader="lf.read_definitions")
        report = DataReport("pairs")
        kept: list[Definition] = []
        for number, pair in enumerate(pairs):
            place = f"pairs, pair {number}"
            _collect(_as_definition(pair, place), place, on_empty, report, kept)
        return _finished(kept, report)

    def __len__(self) -> int:
        return len(self.words)

    @overload
    def __getitem__(self, index: int) -> Definition: ...
    @overload
    def __getitem__(self, index: slice) -> DefinitionDataset: ...
    def __getitem__(self, index: int | slice) -> Definition | DefinitionDataset:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        return Definition(
            self.words[index], self.glosses[index], None if self.pos is None else self.pos[index],
            None if self.keys is None else self.keys[index],
        )  # fmt: skip

    def __iter__(self) -> Iterator[Definition]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DefinitionDataset):
            return NotImplemented
        return (self.words, self.glosses, self.pos, self.keys) == (other.words, other.glosses, other.pos, other.keys)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"DefinitionDataset({len(self)} definitions of {len(set(self.words))} words)"

    def select(self, rows: Iterable[int]) -> DefinitionDataset:
        """The dataset of these rows, in this order; it carries the same report."""
        rows = list(rows)

        def column(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[row] for row in rows]

        return DefinitionDataset(
            [self.words[row] for row in rows], [self.glosses[row] for row in rows], column(self.pos), column(self.keys),
            self.report, words_known=self.words_known,
        )  # fmt: skip

    def split(self, shares: Sequence[float] = (0.8, 0.1, 0.1), *, seed: int = 0) -> tuple[DefinitionDataset, ...]:
        """Part the dataset at random, one part per share, with no word in two parts (all its glosses stay together).

        Words that differ in case only count as one: many tables give them one vector. Each part keeps the order of the
        rows; the parting depends on the words, the shares and the seed alone, on every platform.

        Args:
            shares: of the distinct words, positive numbers with sum 1: (train, validation, test), say.
            seed: non-negative integer.

        Raises:
            DataError: shares out of range; so few words that a part would be empty; a file that hides its words (their
            glosses cannot be kept together: use the parts it comes in).
        """
        given, shares = shares, list(shares) if isinstance(shares, Iterable) else []
        positive = all(isinstance(share, Real) and share > 0 for share in shares)
        if len(shares) < 2 or not positive or abs(sum(shares) - 1.0) > 1e-9:
            raise DataError(
                "shares are out of range", value=shown(given), limit="two or more positive numbers with sum 1",
                remedy="give (0.8, 0.1, 0.1), say",
            )  # fmt: skip
        if not self.words_known:
            raise DataError(
                "the words of these definitions are hidden, so a split could not keep a word's glosses together",
                value=self.report.source, remedy="use the file's own parts, or the complete file with words",
            )  # fmt: skip
        distinct = list(dict.fromkeys(word.casefold() for word in self.words))
        ends = [round(sum(shares[: i + 1]) * len(distinct)) for i in range(len(shares))]
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        if min(sizes) < 1:
            raise DataError(
                "a part of the split would be empty", value=f"{len(distinct)} words with shares {shares}",
                remedy="use more words or other shares",
            )  # fmt: skip
        part = {}
        for place, word in enumerate(shuffled(distinct, seed)):
            part[word] = next(i for i, end in enumerate(ends) if place < end)
        rows: list[list[int]] = [[] for _ in shares]
        for row, word in enumerate(self.words):
            rows[part[word.casefold()]].append(row)
        return tuple(map(self.select, rows))

    def with_vectors(self, vectors: VectorSource, *, missing: str = "error") -> tuple[DefinitionDataset, np.ndarray]:
        """The pairs whose word has a vector, and those vectors, float32 ``[pairs, dim]``.

        Raises DataError naming words without a vector, unless ``missing="skip"``; the pairs left out are then counted in
        the new dataset's report.
        """
        vectors, keys = checked_source(vectors), self.words
        if vectors.keyed_by == "id" and self.keys is not None:
            keys = [key or word for key, word in zip(self.keys, self.words, strict=True)]
        found = vectors.lookup(keys, missing=missing)
        part = self.select(found.rows)
        report = DataReport(**self.report.to_dict())
        kept = set(found.rows)
        for row in range(len(self)):
            if row not in kept:
                report.drop("word without a vector", f"row {row} ({self.words[row]})")
        report.kept = len(part)
        part.report = report
        return part, found.vectors

    def glosses_by_word(self) -> dict[tuple[str, str | None], list[str]]:
        """All glosses of each (word, part of speech), in order: what lemma-BLEU compares with."""
        found: dict[tuple[str, str | None], list[str]] = {}
        for i, word in enumerate(self.words):
            found.setdefault((word, None if self.pos is None else self.pos[i]), []).append(self.glosses[i])
        return found

    def sentences(self) -> SentenceDataset:
        """The glosses as sentences, to train a VAE on."""
        return SentenceDataset(self.glosses, report=self.report)

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the content, in order; independent of the platform and of where it came from."""
        digest = hashlib.sha256(b"lmvae_fast.definitions 1\n")
        for pair in self:
            record = [pair.word, pair.gloss, pair.pos, pair.key]
            digest.update(json.dumps(record, ensure_ascii=True).encode("ascii") + b"\n")
        return digest.hexdigest()


def read_definitions(
    path: str | os.PathLike[str],
    *,
    word_column: str | int | None = None,
    gloss_column: str | int | None = None,
    pos_column: str | int | None = None,
    format: str | None = None,
    header: bool | None = None,
    quoting: bool = True,
    delimiter: str | None = None,
    limit: int | None = None,
    on_empty: str = "error",
) -> DefinitionDataset:
    """Read words with their glosses.

    Args:
        path: a ``.tsv`` or ``.csv`` table, ``.jsonl`` (an object a line), or ``.json``: CODWOE's list of objects with ``id``
            and ``gloss`` (and ``word``, ``pos`` in its complete files). All but .json also with .gz.
        word_column, gloss_column, pos_column: names, or indices from 0 (csv/tsv). Default: the first of ``word``,
            ``lemma``, ``term``, ``definiendum``; of ``definition``, ``gloss``, ``definiens``; ``pos`` where present.
        format, header, quoting, delimiter: as of :func:`lmvae_fast.read`.
        limit: stop after this many pairs.
        on_empty: an empty word or gloss: ``"error"`` raises, ``"drop"`` counts it in the report.

    Returns:
        The dataset; ``.report`` counts what was read, kept and dropped.

    Raises:
        DataError: the file is missing or malformed (the message names the line), a column does not exist, a word or gloss
            is empty, or no pair is left.
    """
    path = Path(path)
    check_options(on_empty, limit)
    if path.suffix.lower() == ".json" and format in (None, "codwoe"):
        return _read_codwoe(path, word_column, gloss_column, pos_column, limit, on_empty)
    names = field_names(path, format=format, header=header, quoting=quoting, delimiter=delimiter)
    word = _column("word", word_column, names, WORD_COLUMNS, path)
    gloss = _column("gloss", gloss_column, names, GLOSS_COLUMNS, path)
    pos = pos_column if pos_column is not None else next((name for name in POS_COLUMNS if name in names), None)
    report = DataReport(str(path), format)
    kept: list[Definition] = []
    rows = placed_rows(
        path, report, format=format, column=gloss, factor_columns={"word": word, **({} if pos is None else {"pos": pos})},
        header=header, quoting=quoting, delimiter=delimiter, as_written=True,
    )  # fmt: skip
    for place, row in rows:
        values: dict[str, Any] = row["factors"] if row else {"word": None}  # an empty line
        part = values.get("pos")
        part = part if part is None or isinstance(part, str) else json.dumps(part)
        text: Any = row["text"] if row else None
        pair = Definition(values["word"], text, None if part in ("", "null") else part)
        _collect(pair, place, on_empty, report, kept)
        if len(kept) == limit:
            report.stopped_at_limit = True
            break
    return _finished(kept, report)


def _as_definition(pair: Any, place: str) -> Definition:
    if isinstance(pair, Definition):
        return pair
    fields = tuple(pair) if isinstance(pair, Iterable) and not isinstance(pair, (str, bytes, Mapping)) else ()
    if not 2 <= len(fields) <= 4:
        raise DataError(
            f"{place} is no word with its gloss", value=shorten(repr(pair)), limit="(word, gloss), or a Definition",
            remedy="mend it, or make a Definition of it",
        )  # fmt: skip
    return Definition(*fields)


def _collect(pair: Definition, place: str, on_empty: str, report: DataReport, kept: list[Definition]) -> None:
    """Keep one pair, its texts without blanks around them; what is empty (None too) is refused or counted."""
    report.read += 1
    texts: dict[str, str] = {}
    for name in ("word", "gloss"):
        value = getattr(pair, name)
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{place}: the {name} is no text", value=f"{shorten(repr(value))} ({type(value).__name__})",
                limit="a string", remedy="mend it",
            )  # fmt: skip
        texts[name] = one_line(value or "")
    empty = next((name for name, text in texts.items() if not text), None)
    if empty is None:
        kept.append(replace(pair, **texts))
    elif on_empty == "error":
        raise DataError(
            f"{place}: the {empty} is empty", value=f"word {pair.word!r}, gloss {shorten(repr(pair.gloss))}",
            remedy="mend it, or choose on_empty='drop'",
        )  # fmt: skip
    else:
        report.drop(f"empty {empty}", f"{place} ({pair.word})")


def _finished(kept: list[Definition], report: DataReport, *, words_known: bool = True) -> DefinitionDataset:
    report.kept = len(kept)
    if not kept:
        raise DataError("there are no definitions", value=str(report), limit="at least one", remedy="check the file")
    return DefinitionDataset(
        [pair.word for pair in kept], [pair.gloss for pair in kept], [pair.pos for pair in kept],
        [pair.key for pair in kept], report, words_known=words_known,
    )  # fmt: skip


def _column(what: str, given: str | int | None, names: list[str], usual: tuple[str, ...], path: Path) -> str | int:
    if given is not None:
        return given
    found = next((name for name in usual if name in names), None)
    if found is None:
        raise DataError(
            f"{path}: which column holds the {what}?", value=", ".join(names) or "(no header)", limit=", ".join(usual),
            remedy=f"give {what}_column= a name or an index from 0",
        )  # fmt: skip
    return found


def _read_codwoe(
    path: Path, word_column: str | int | None, gloss_column: str | int | None, pos_column: str | int | None,
    limit: int | None, on_empty: str,
) -> DefinitionDataset:  # fmt: skip
    for column in (word_column, gloss_column, pos_column):
        if isinstance(column, int):
            raise DataError(f"{path}: a JSON field goes by its name", value=column, remedy="give its name")
    records = read_json_list(path)
    names = list(records[0])
    gloss = _column("gloss", gloss_column, names, GLOSS_COLUMNS[1:], path)
    word = word_column if word_column is not None else "word" if "word" in names else "id"
    pos = pos_column or "pos"
    report = DataReport(str(path), "codwoe")
    kept: list[Definition] = []
    for i, record in enumerate(records):
        lacking = [name for name in (gloss, word) if name not in record]
        if lacking:
            raise DataError(
                f"{path}, entry {i} has no {lacking[0]!r}",
                value=", ".join(record),
                remedy="name the field of the entries",
            )
        fields: dict[Any, Any] = record
        pair = Definition(fields[word], fields[gloss], fields.get(pos), fields.get("id"))
        _collect(pair, f"{path}, entry {i}", on_empty, report, kept)
        if len(kept) == limit:
            report.stopped_at_limit = True
            break
    return _finished(kept, report, words_known=word != "id")
