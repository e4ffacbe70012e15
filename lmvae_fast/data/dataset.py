"""Sentences, with per-word labels and generative factors where they are known: what every reader returns."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

from lmvae_fast.data.lines import one_line
from lmvae_fast.data.not_rows import refuse_for_rows
from lmvae_fast.data.stable_random import shuffled
from lmvae_fast.errors import DataError, OutputError

#: How many places a report names for each reason; the rest is only counted.
PLACES_NAMED = 5

ON_EMPTY = ("drop", "error")


@dataclass(frozen=True)
class Example:
    """One sentence.

    Attributes:
        text: the sentence; not empty.
        labels: one label per whitespace-separated word of ``text`` (semantic roles, say), or None.
        factors: the generative factors of the sentence by name, or None.

    Raises DataError when the text is not a string or empty, or when labels and words differ in number.
    """

    text: str
    labels: tuple[str, ...] | None = None
    factors: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise DataError("a sentence must be a string", value=f"{self.text!r} ({type(self.text).__name__})")
        if not self.text.strip():
            raise DataError("a sentence is empty", value=repr(self.text), remedy="drop it, or on_empty='drop'")
        if self.labels is not None:
            words = len(self.text.split())
            if len(self.labels) != words:
                raise DataError(
                    "labels and words differ in number",
                    value=f"{len(self.labels)} labels for {shorten(self.text)!r}",
                    limit=f"{words} labels, one per whitespace-separated word",
                    remedy="mend the labels or leave them out",
                )


@dataclass
class DataReport:
    """What happened to the rows of a source on the way to a dataset.

    Attributes:
        source: path or description.
        format: format read, or None for a Python iterable.
        read: rows looked at (sentences, not header lines).
        kept: rows in the dataset.
        dropped: rows left out, counted by reason.
        places: for each reason, the first few places (``line 7``) that it applied to.
        stopped_at_limit: reading ended at ``limit``; whatever came after was not looked at.
    """

    source: str
    format: str | None = None
    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    stopped_at_limit: bool = False

    def drop(self, reason: str, place: str) -> None:
        """Count one row that was left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        named = self.places.setdefault(reason, [])
        if len(named) < PLACES_NAMED:
            named.append(place)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lost = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items())) or "none"
        ended = " (stopped at the limit)" if self.stopped_at_limit else ""
        return f"{self.source}: {self.kept} of {self.read} rows kept; dropped: {lost}{ended}"


class SentenceDataset(Sequence[Example]):
    """A sequence of :class:`Example`, stored by column so that hundreds of thousands of sentences stay small.

    ``dataset[3]`` is an Example; ``dataset[:100]`` and ``dataset.select(rows)`` are datasets.

    Attributes:
        texts: the sentences.
        labels: per-word labels of each sentence (None where it has none), or None when no sentence has any.
        factors: factors of each sentence (None where it has none), or None when no sentence has any.
        report: what was kept and dropped on the way here.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[tuple[str, ...] | None] | None = None,
        factors: Sequence[dict[str, str] | None] | None = None,
        report: DataReport | None = None,
    ):
        refuse_for_rows(texts, "SentenceDataset")
        for name, column in (("labels", labels), ("factors", factors)):
            if column is not None and len(column) != len(texts):
                raise DataError(f"{name} and texts differ in length", value=len(column), limit=len(texts))
        self.texts: list[str] = list(texts)
        self.labels = None if labels is None or all(row is None for row in labels) else list(labels)
        self.factors = None if factors is None or all(row is None for row in factors) else list(factors)
        self.report = report or DataReport("memory", read=len(self.texts), kept=len(self.texts))

    @classmethod
    def from_iterable(
        cls,
        rows: Iterable[str | Example | Mapping[str, Any]],
        *,
        on_empty: str = "drop",
        limit: int | None = None,
    ) -> SentenceDataset:
        """Collect sentences given as strings, Examples or mappings with ``text`` and perhaps ``labels``, ``factors``.

        Args:
            rows: any iterable; read once.
            on_empty: ``"drop"`` counts empty sentences in the report and goes on, ``"error"`` raises.
            limit: keep at most this many sentences.

        Raises:
            DataError: a text, a path or a table for the rows, a row of another kind, labels that do not match the words, an
                empty sentence under ``on_empty="error"``, a bad option, or no sentence at all.
        """
        check_options(on_empty, limit)
        refuse_for_rows(rows, "SentenceDataset.from_iterable")
        report = DataReport("iterable")
        columns = _Columns()
        for number, row in enumerate(rows):
            report.read += 1
            columns.add(row, f"row {number}", on_empty, report)
            if columns.count == limit:
                report.stopped_at_limit = True
                break
        return columns.finish(report)

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> SentenceDataset: ...
    def __getitem__(self, index: int | slice) -> Example | SentenceDataset:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        labels = self.labels[index] if self.labels is not None else None
        factors = self.factors[index] if self.factors is not None else None
        return Example(self.texts[index], labels, factors)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SentenceDataset):
            return NotImplemented
        return (self.texts, self.labels, self.factors) == (other.texts, other.labels, other.factors)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        extras = [name for name in ("labels", "factors") if getattr(self, name) is not None]
        return f"SentenceDataset({len(self)} sentences{', with ' + ' and '.join(extras) if extras else ''})"

    def select(self, rows: Iterable[int]) -> SentenceDataset:
        """The dataset of these rows, in this order; it carries the same report."""
        rows = list(rows)
        return SentenceDataset(
            [self.texts[row] for row in rows],
            None if self.labels is None else [self.labels[row] for row in rows],
            None if self.factors is None else [self.factors[row] for row in rows],
            self.report,
        )

    def label_set(self) -> tuple[str, ...]:
        """Every label that occurs, sorted; empty when there are none."""
        return tuple(sorted({label for row in self.labels or () for label in row or ()}))

    def factor_values(self) -> dict[str, tuple[str, ...]]:
        """Every factor's name and the sorted values that occur; empty when there are none."""
        values: dict[str, set[str]] = {}
        for row in self.factors or ():
            for name, value in (row or {}).items():
                values.setdefault(name, set()).add(value)
        return {name: tuple(sorted(values[name])) for name in sorted(values)}

    def word_counts(self) -> Counter[str]:
        """How often each whitespace-separated word occurs."""
        return Counter(word for text in self.texts for word in text.split())

    def split(self, *, held_out: float, seed: int = 0) -> tuple[SentenceDataset, SentenceDataset]:
        """Part the dataset at random into ``(train, held_out)`` with no sentence in both.

        Rows with the same text stay together. Each part keeps the order of the rows. The parting depends only on the
        texts, ``held_out`` and ``seed``: it is the same on every platform and Python version.

        Args:
            held_out: share of the distinct sentences that is held out, in (0, 1); 0.1 keeps nine tenths for training.
            seed: non-negative integer.

        Raises:
            DataError: the share is out of range, or so few distinct sentences that a part would be empty.
        """
        if not isinstance(held_out, (int, float)) or not 0.0 < held_out < 1.0:
            raise DataError(
                "held_out is out of range", value=held_out, limit="0 < held_out < 1, a share of the sentences"
            )
        # A dict keeps first occurrences in order (a set would order by the process's hash seed).
        distinct = list(dict.fromkeys(self.texts))
        num_held_out = round(held_out * len(distinct))
        if num_held_out in (0, len(distinct)):
            raise DataError(
                "a part of the split would be empty",
                value=f"{len(distinct)} distinct sentences with held_out={held_out}",
                remedy="use more sentences or another share",
            )
        outside = set(shuffled(distinct, seed)[:num_held_out])
        return (
            self.select(row for row, text in enumerate(self.texts) if text not in outside),
            self.select(row for row, text in enumerate(self.texts) if text in outside),
        )

    def filter_length(self, min_words: int = 1, max_words: int | None = None) -> SentenceDataset:
        """The sentences of ``min_words`` to ``max_words`` words, with the others counted in the new dataset's report.

        This counts words; a model's own limit counts its tokens and is applied by ``model.tokenize``.
        """
        if min_words < 1 or (max_words is not None and max_words < min_words):
            raise DataError(
                "length limits contradict each other",
                value=f"min_words={min_words}, max_words={max_words}",
                limit="1 <= min_words <= max_words",
            )
        # `read` stays that of the source: rows dropped on the way there are in the report already.
        report = DataReport(**self.report.to_dict())
        kept = []
        for row, text in enumerate(self.texts):
            words = len(text.split())
            if words < min_words:
                report.drop(f"shorter than {min_words} words", f"row {row}")
            elif max_words is not None and words > max_words:
                report.drop(f"longer than {max_words} words", f"row {row}")
            else:
                kept.append(row)
        report.kept = len(kept)
        if not kept:
            raise DataError(
                "no sentence has the length asked for", value=str(report),
                limit=f"{min_words} to {max_words or 'any number of'} words", remedy="widen the limits",
            )  # fmt: skip
        part = self.select(kept)
        part.report = report
        return part

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the content (texts, labels and factors in order): the key of every cache.

        It does not depend on where the sentences came from, nor on the platform.
        """
        digest = hashlib.sha256(b"lmvae_fast.data 1\n")
        for row, text in enumerate(self.texts):
            labels = self.labels[row] if self.labels is not None else None
            factors = self.factors[row] if self.factors is not None else None
            record = [text, labels, None if factors is None else sorted(factors.items())]
            # JSON is an injective encoding of this record: no two datasets run together into one stream of bytes.
            digest.update(json.dumps(record, ensure_ascii=True).encode("ascii") + b"\n")
        return digest.hexdigest()

    def write_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object per line (``text``, and ``labels``, ``factors`` where known); ``read`` reads it back.

        Raises OutputError when the file cannot be written.
        """
        try:
            with Path(path).open("w", encoding="utf-8", newline="\n") as file:
                for example in self:
                    record: dict[str, Any] = {"text": example.text}
                    if example.labels is not None:
                        record["labels"] = list(example.labels)
                    if example.factors is not None:
                        record["factors"] = example.factors
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {error.strerror or error}", remedy="choose another path"
            ) from error


class _Columns:
    """Collects checked rows column by column."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.labels: list[tuple[str, ...] | None] = []
        self.factors: list[dict[str, str] | None] = []

    @property
    def count(self) -> int:
        return len(self.texts)

    def add(self, row: Any, place: str, on_empty: str, report: DataReport) -> None:
        """Check one row and keep it, or drop it if it is empty."""
        text, labels, factors = _parts(row, place)
        text = one_line(text)  # a quoted field or JSON string may hold line breaks
        if not text:
            if on_empty == "error":
                raise DataError(f"{place}: the sentence is empty", remedy="mend it, or choose on_empty='drop'")
            report.drop("empty", place)
            return
        try:
            Example(text, labels, factors)
        except DataError as error:
            raise DataError(
                f"{place}: {error.problem}", value=error.value, limit=error.limit, remedy=error.remedy
            ) from None
        self.texts.append(text)
        # A label or factor occurs in thousands of rows: keep one string of each.
        self.labels.append(None if labels is None else tuple(sys.intern(label) for label in labels))
        self.factors.append(
            None if factors is None else {sys.intern(name): sys.intern(value) for name, value in factors.items()}
        )

    def finish(self, report: DataReport) -> SentenceDataset:
        report.kept = self.count
        if not self.texts:
            raise DataError(
                "the dataset is empty",
                value=str(report),
                limit="at least one sentence",
                remedy="check the file, its format and its column",
            )
        return SentenceDataset(self.texts, self.labels, self.factors, report)


def _parts(row: Any, place: str) -> tuple[str, tuple[str, ...] | None, dict[str, str] | None]:
    """Text, labels and factors of one row of any accepted kind; raises DataError for another."""
    if isinstance(row, str):
        return row, None, None
    if isinstance(row, Example):
        return row.text, row.labels, row.factors
    if not isinstance(row, Mapping):
        raise DataError(
            f"{place} is no sentence",
            value=f"{shorten(repr(row))} ({type(row).__name__})",
            limit="a string, an Example or a mapping with 'text'",
        )
    if "text" not in row:
        raise DataError(
            f"{place} has no 'text'",
            value=f"fields {', '.join(map(str, row)) or '(none)'}",
            remedy="name the field that holds the sentence 'text'",
        )
    text, labels, factors = row["text"], row.get("labels"), row.get("factors")
    if not isinstance(text, str):
        raise DataError(f"{place}: 'text' is not a string", value=f"{shorten(repr(text))} ({type(text).__name__})")
    if isinstance(labels, str):
        labels = labels.split()
    if labels is not None and (
        not isinstance(labels, Sequence) or not all(isinstance(label, str) and label for label in labels)
    ):
        raise DataError(f"{place}: labels are not a list of strings", value=shorten(repr(labels)))
    if factors is not None and (
        not isinstance(factors, Mapping)
        or not all(isinstance(name, str) and isinstance(value, str) for name, value in factors.items())
    ):
        raise DataError(f"{place}: factors are not a mapping of names to strings", value=shorten(repr(factors)))
    return text, None if labels is None else tuple(labels), None if factors is None else dict(factors)


def check_options(on_empty: str, limit: int | None) -> None:
    """Raise DataError for an unknown ``on_empty`` or a limit that is no positive integer."""
    if on_empty not in ON_EMPTY:
        raise DataError("unknown on_empty", value=repr(on_empty), limit=", ".join(ON_EMPTY))
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise DataError("limit is out of range", value=repr(limit), limit="an integer >= 1, or None")


def shorten(text: str, width: int = 80) -> str:
    """At most ``width`` characters of a text, for messages."""
    return text if len(text) <= width else text[: width - 3] + "..."
