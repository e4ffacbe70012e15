"""What parts the fields of a table: spreadsheets write other signs than the ending of a file's name says."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmvae_fast.data.lines import Line
from lmvae_fast.errors import DataError

_NATIVE = {"csv": ",", "tsv": "\t"}
_LOOKED_AT = 20  # lines
_CANDIDATES = (",", ";", "\t", "|")


def table_reader(
    lines: Iterator[Line], path: Path, format: str, *, delimiter: str | None = None, quoting: bool = True
) -> Any:
    """A ``csv.reader`` of a csv or tsv file's lines with the delimiter that they have.

    delimiter: what parts fields; None: what parts each of the first lines into equally many.

    Raises DataError where the lines could be parted in two ways, and for a delimiter that is none.
    """
    if delimiter is None:
        head, lines = _head(lines)
        delimiter = _delimiter_of(head, path, format, quoting)
    elif not isinstance(delimiter, str) or len(delimiter) != 1 or delimiter in '"\r\n':
        raise DataError(
            "delimiter is no single character", value=repr(delimiter), limit=", ".join(map(repr, _CANDIDATES))
        )
    # csv needs the line breaks, which may stand inside quotes.
    return csv.reader((text + "\n" for _, text in lines), delimiter=delimiter, quoting=_quoting(quoting), strict=True)


def _quoting(quoting: bool) -> Any:
    return csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE


def _head(lines: Iterator[Line]) -> tuple[list[str], Iterator[Line]]:
    """The texts of the first lines; and all lines, still to be read, an error among the first in its place."""
    seen: list[Line] = []
    failed: list[DataError] = []
    try:
        seen.extend(itertools.islice(lines, _LOOKED_AT))
    except DataError as error:
        failed.append(error)

    def again() -> Iterator[Line]:
        yield from seen
        for error in failed:
            raise error
        yield from lines

    return [text for _, text in seen], again()


def _delimiter_of(head: list[str], path: Path, format: str, quoting: bool) -> str:
    own = _NATIVE[format]
    widths = {sign: _width(head, sign, quoting) for sign in _CANDIDATES}
    others = [sign for sign in _CANDIDATES if sign != own and widths[sign] > 1]
    # A tab is nothing that a sentence has.
    if not others or (widths[own] > 1 and own == "\t"):
        return own
    found = [own, *others] if widths[own] > 1 else others
    # Commas in every line of a single column may well be the sentences' own, unless they part the names of columns.
    prose = found == [","] and not _names(head, quoting)
    if len(found) > 1 or prose:
        raise DataError(
            f"{path}: what parts its fields?", value=f"{head[0][:80]!r}",
            limit=" or ".join(map(repr, [own, *found] if prose else found)), remedy="say which with delimiter=",
        )  # fmt: skip
    return found[0]


def _width(head: list[str], delimiter: str, quoting: bool) -> int:
    """Fields that a delimiter parts each of these lines into; 0 where they differ."""
    try:
        rows = list(csv.reader((text + "\n" for text in head), delimiter=delimiter, quoting=_quoting(quoting)))
    except csv.Error:
        return 0
    if len(head) == _LOOKED_AT and len(rows) > 1:
        rows.pop()  # a quoted field may go on in the next line
    widths = {len(row) for row in rows if "".join(row).strip()}
    return widths.pop() if len(widths) == 1 else 0


def _names(head: list[str], quoting: bool) -> bool:
    first: Sequence[str] = next(csv.reader(head, quoting=_quoting(quoting)), [])
    return all(cell.strip().isidentifier() for cell in first)
