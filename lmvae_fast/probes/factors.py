"""Factors of sentences as whole numbers: from a corpus's generative factors, from semantic role labels, from any table.

All return a :class:`FactorTable`, whose ``y`` goes into every metric of ``lmvae_fast.probes.disentanglement``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmvae_fast.data.dataset import SentenceDataset, shorten
from lmvae_fast.errors import DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.results import Array

#: What a factor of role labels can be.
DEFINITIONS = ("presence", "count", "langspace")

_CHUNK_PREFIX = re.compile(r"[BIES]-")
_CORE_ROLE = re.compile(r"ARG\d")


@dataclass(frozen=True)
class FactorTable:
    """Factors of N sentences.

    Attributes:
        names: the K factors.
        values: the values of each factor, as they were before coding; ``y[n, k]`` indexes ``values[k]``.
        y: int64 ``[N, K]``; -1 where a sentence has no value of a factor.
        choices: how the factors were made.
    """

    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    y: Array
    choices: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.y)

    def select(self, names: Iterable[str]) -> FactorTable:
        """The table of these factors, in this order; raises DataError for a name that it does not have."""
        wanted = list(names)
        unknown = [name for name in wanted if name not in self.names]
        if unknown or not wanted:
            raise DataError(
                "no such factor", value=", ".join(unknown) or "(none asked for)", limit=", ".join(self.names)
            )
        places = [self.names.index(name) for name in wanted]
        return FactorTable(
            tuple(wanted), tuple(self.values[place] for place in places), self.y[:, places], self.choices
        )

    def rows(self, rows: Any) -> FactorTable:
        """The table of these rows (indices or a mask)."""
        return FactorTable(self.names, self.values, self.y[rows], self.choices)

    def beside(self, other: FactorTable) -> FactorTable:
        """Both tables' factors of the same sentences; raises DataError for other numbers of rows or names in both."""
        shared = set(self.names) & set(other.names)
        if len(self) != len(other) or shared:
            raise DataError(
                "these tables do not go together",
                value=f"{len(self)} and {len(other)} rows, in both: {', '.join(sorted(shared)) or 'no name'}",
                limit="the same rows and different names",
            )
        return FactorTable(
            self.names + other.names, self.values + other.values, np.concatenate([self.y, other.y], axis=1),
            {"first": self.choices, "second": other.choices},
        )  # fmt: skip

    def named(self, value: Mapping[int, str]) -> dict[str, str]:
        """A mapping of factor indices, such as a result's ``left_out["factors"]``, by the factors' names."""
        return {self.names[place]: text for place, text in value.items()}


def table(columns: Mapping[str, Sequence[Any]], *, absent: Any = None) -> FactorTable:
    """Factors from columns of any hashable values.

    Args:
        columns: name -> one value for each sentence. Values are coded in sorted order (by their text where they cannot be
            compared).
        absent: stands for "no value" (besides None).

    Raises:
        DataError: no column, columns of different length, or a value that cannot be a key.
    """
    lengths = {name: len(column) for name, column in columns.items()}
    if not columns or len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError("factors must be columns of one length", value=lengths or "no column", limit="at least one row")
    values, coded = [], []
    for name, column in columns.items():
        column = column.tolist() if isinstance(column, np.ndarray) else list(column)
        try:
            found = {value for value in column if value is not None and value != absent}
        except TypeError as error:
            raise DataError(f"factor {name!r} holds what is no single value", value=str(error)) from None
        try:
            ordered = sorted(found)
        except TypeError:
            ordered = sorted(found, key=lambda value: (type(value).__name__, str(value)))
        place = {value: code for code, value in enumerate(ordered)}
        values.append(tuple(ordered))
        coded.append([place.get(value, checks.ABSENT) for value in column])
    return FactorTable(tuple(columns), tuple(values), np.array(coded, dtype=np.int64).T, {"source": "table"})


def generative(data: SentenceDataset, names: Iterable[str] | None = None) -> FactorTable:
    """The generative factors that come with a dataset, such as those of the bundled corpus: the exact truth.

    Args:
        data: a dataset with ``factors``; a sentence that lacks a factor has no value of it.
        names: factors to take; None for all, in sorted order.

    Raises:
        DataError: the dataset has no factors, or not these.
    """
    if data.factors is None:
        raise DataError(
            "these sentences have no generative factors",
            value=repr(data),
            remedy="read them with factors=, or use labels",
        )
    known = tuple(data.factor_values())
    columns = {name: [(row or {}).get(name) for row in data.factors] for name in known}
    made = table(columns)
    made = FactorTable(made.names, made.values, made.y, {"source": "generative factors"})
    return made if names is None else made.select(names)


def from_labels(
    labels: Sequence[Sequence[str] | None],
    *,
    definition: str = "presence",
    groups: Mapping[str, Sequence[str]] | None = None,
    cap: int = 3,
) -> FactorTable:
    """Factors from per-word role labels.

    Args:
        labels: one sequence of labels for each sentence; None for a sentence without any, which has no value then. Chunk
            prefixes (``B-``, ``I-``) are taken off, so that a role of one word counts like a longer one.
        definition: ``"presence"``: does a label of the group occur (0 or 1)? ``"count"``: how many different ones, at most
            ``cap``. ``"langspace"``: LangSpace's factor values, the sequence of the group's labels over words ("ARG1 ARG1
            ARG2" and "ARG1 ARG2" differ, so values count words); sentences without the group have no value.
        groups: factor name -> its labels; None for one factor for each label that occurs, or, under ``"count"``, one
            factor ``core_roles`` of ARG0, ARG1, ...
        cap: highest count.

    Raises:
        DataError: no sentence has labels, or a group is empty. ConfigError: definition, cap.
    """
    checks.one_of("definition", definition, DEFINITIONS)
    checks.whole("cap", cap, 1)
    stripped = [None if row is None else [_CHUNK_PREFIX.sub("", label, count=1) for label in row] for row in labels]
    occurring = sorted({label for row in stripped if row is not None for label in row})
    if not occurring:
        raise DataError(
            "no sentence has role labels", value=f"{len(stripped)} sentences", remedy="read a labelled file"
        )
    if groups is None:
        core = [label for label in occurring if _CORE_ROLE.fullmatch(label)]
        groups = {"core_roles": core} if definition == "count" else {label: [label] for label in occurring}
    empty = [name for name, members in groups.items() if not members or isinstance(members, str)]
    if empty or not groups:
        raise DataError(
            "a factor needs a list of labels", value=", ".join(empty) or "no factor", limit=", ".join(occurring)
        )
    columns: dict[str, list[Any]] = {}
    for name, members in groups.items():
        wanted = set(members)
        columns[name] = [
            None if row is None else _value([x for x in row if x in wanted], definition, cap) for row in stripped
        ]
    made = table(columns)
    choices = {
        "source": "role labels",
        "definition": definition,
        "groups": {name: list(m) for name, m in groups.items()},
    }
    return FactorTable(made.names, made.values, made.y, choices | ({"cap": cap} if definition == "count" else {}))


def role_content(
    texts: Sequence[str],
    labels: Sequence[Sequence[str] | None],
    roles: Sequence[str] = ("ARG0", "ARG1"),
    *,
    words: Sequence[str] | None = None,
    most_frequent: int = 10,
    name: str = "content",
) -> FactorTable:
    """Which word fills a role: the first word of the sentence that bears one of the roles and is one of ``words``.

    Args:
        texts: sentences; words are split at white space.
        labels: one label for each word.
        roles: labels that count, without chunk prefixes.
        words: values of the factor; None for the ``most_frequent`` words in these roles. Sentences without any have no
            value.

    Raises:
        DataError: labels do not match words, or no word bears the roles.
    """
    if len(texts) != len(labels):
        raise DataError("texts and labels differ in length", value=len(labels), limit=len(texts))
    bearers: list[list[str]] = []
    for row, (text, marks) in enumerate(zip(texts, labels, strict=True)):
        split = text.split()
        if marks is not None and len(marks) != len(split):
            raise DataError(
                f"row {row}: labels and words differ in number",
                value=f"{len(marks)} labels for {shorten(text)!r}",
                limit=f"{len(split)} labels",
            )
        pairs = zip(split, marks or (), strict=False)
        bearers.append([word for word, mark in pairs if _CHUNK_PREFIX.sub("", mark, count=1) in roles])
    counts = Counter(word for row in bearers for word in row)
    wanted = list(words) if words is not None else [word for word, _ in counts.most_common(most_frequent)]
    if not any(word in counts for word in wanted):
        raise DataError(
            "no word bears these roles", value=", ".join(roles), limit="words: " + shorten(", ".join(wanted))
        )
    column = [next((word for word in row if word in wanted), None) for row in bearers]
    made = table({name: column})
    choices = {"source": "role content", "roles": list(roles), "words": wanted}
    return FactorTable(made.names, made.values, made.y, choices)


def _value(found: list[str], definition: str, cap: int) -> Any:
    if definition == "presence":
        return int(bool(found))
    if definition == "count":
        return min(len(set(found)), cap)
    return " ".join(found) or None
