"""The rows of CSV and TSV files, and which of their columns hold what."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmvae_fast.data.dataset import shorten
from lmvae_fast.data.delimiters import table_reader
from lmvae_fast.data.lines import Line
from lmvae_fast.errors import DataError

#: Column names taken when the caller names none, in this order.
TEXT_COLUMNS = ("text", "sentence")

# What often stands beside sentences; a single one may be a word of the data.
_OTHER_COLUMNS = frozenset(
    ("id", "index", "label", "labels", "lemma", "word", "pos", "gloss", "definition", "prompt", "response")
)

# A header's cell: an identifier-like name, no sentence and no number.
_HEADER_CELL = re.compile(r"[^\W\d][\w.-]*")


def table_rows(
    lines: Iterator[Line],
    path: Path,
    format: str,
    column: str | int | None,
    label_column: str | int | None,
    factors: dict[str, str | int],
    header: bool | None,
    quoting: bool,
    delimiter: str | None = None,
) -> Iterator[tuple[int, Any]]:
    table = table_reader(lines, path, format, delimiter=delimiter, quoting=quoting)
    names: list[str] | None = None
    places: _Places | None = None
    width = 0
    while True:
        number = table.line_num + 1  # a quoted field may span lines: a row is named by its first
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}, line {number}: malformed {format}: {error}",
                remedy="mend the quotes, or read with quoting=False" if quoting else "mend the line",
            ) from None
        if not "".join(cells).strip() and len(cells) < 2:
            yield number, ""
            continue
        if places is None:
            named = any(isinstance(name, str) for name in (column, label_column, *factors.values()))
            unsure = header is None and not named and is_header(cells) and not _names_columns(cells)
            header = named or is_header(cells) if header is None else header
            names = [cell.strip() for cell in cells] if header else None
            places = _Places(path, format, cells, names, column, label_column, factors)
            if unsure:  # single words may be sentences, too, and nothing says that they are names
                raise DataError(
                    f"{path}: the first row may be the names of columns, or a sentence with what goes with it",
                    value=shorten(repr(cells[0] if len(cells) == 1 else cells)),
                    limit=", ".join(TEXT_COLUMNS),
                    remedy="give the column by its name, or say which with header=True or header=False",
                )
            width = len(cells)
            if header:
                continue
        if len(cells) != width:
            raise DataError(
                f"{path}, line {number}: a row of another width",
                value=f"{len(cells)} fields",
                limit=f"{width} fields as in the first row",
                remedy="mend the row" + (", or read with quoting=False" if quoting else ""),
            )
        yield number, places.row(cells)


def is_header(cells: Sequence[str]) -> bool:
    stripped = [cell.strip() for cell in cells]
    return len(set(stripped)) == len(stripped) and all(_HEADER_CELL.fullmatch(cell) for cell in stripped)


def _names_columns(cells: Sequence[str]) -> bool:
    """Whether words are names of columns beyond doubt: that of sentences among them, or two that stand beside them."""
    known = {cell.strip().lower() for cell in cells}
    return bool(known & set(TEXT_COLUMNS)) or len(known & _OTHER_COLUMNS) > 1


class _Places:
    """Where sentence, labels and factors stand in a row of a table."""

    def __init__(
        self,
        path: Path,
        format: str,
        first: list[str],
        names: list[str] | None,
        column: str | int | None,
        label_column: str | int | None,
        factors: dict[str, str | int],
    ):
        self.path, self.format, self.first, self.names = path, format, first, names
        if column is None:
            column = next((name for name in TEXT_COLUMNS if names and name in names), 0 if len(first) == 1 else None)
        if column is None:
            raise DataError(
                f"{path}: which column holds the sentences?",
                value=f"{len(first)} columns: {shorten(repr(first))}",
                remedy="give column= a name or an index from 0",
            )
        self.text = self._index(column)
        self.labels = None if label_column is None else self._index(label_column)
        self.factors = {name: self._index(place) for name, place in factors.items()}

    def row(self, cells: list[str]) -> dict[str, Any]:
        row: dict[str, Any] = {"text": cells[self.text]}
        if self.labels is not None:
            row["labels"] = cells[self.labels]
        if self.factors:
            row["factors"] = {name: cells[index] for name, index in self.factors.items()}
        return row

    def _index(self, column: str | int) -> int:
        if isinstance(column, str):
            if self.names is not None and column in self.names:
                return self.names.index(column)
            limit = (
                ", ".join(self.names) if self.names is not None else f"indices 0 to {len(self.first) - 1} (no header)"
            )
        elif isinstance(column, int) and 0 <= column < len(self.first):
            return column
        else:
            limit = f"indices 0 to {len(self.first) - 1}"
        raise DataError(
            f"{self.path}: there is no column {column!r}",
            value=shorten(repr(self.first)),
            limit=limit,
            remedy=f"name one of these columns, or check the format {self.format!r}",
        )
