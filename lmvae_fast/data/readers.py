"""Reading sentences from files: plain text, JSON lines, CSV/TSV columns and the ``sentence & labels`` SRL format.

Files are read line by line (gzip too), so memory holds the sentences and nothing else.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmvae_fast.data.dataset import DataReport, SentenceDataset, _Columns, check_options, shorten
from lmvae_fast.data.delimiters import table_reader
from lmvae_fast.data.frames import read_json, read_parquet, table_records
from lmvae_fast.data.lines import Line, decoded_lines, open_file
from lmvae_fast.data.not_rows import as_path, is_table
from lmvae_fast.data.tables import TEXT_COLUMNS, is_header, table_rows
from lmvae_fast.documents import parse_json
from lmvae_fast.errors import DataError

#: File ending -> format. ``.txt`` is checked for SRL labels on its first line.
FORMATS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".srl": "srl",
    ".json": "json",
    ".parquet": "parquet",
}

# What one SRL label looks like (V, O, ARG0, R-ARG1, ARGM-TMP, B-ARG1 ...), and one that makes a line SRL beyond doubt.
_LABEL = re.compile(r"[A-Z][A-Z0-9]*(-[A-Z0-9]+)*")
_ROLE = re.compile(r"([BI]-)?V|.*\bARG.*")


def read(
    path: str | os.PathLike[str] | Any,
    *,
    format: str | None = None,
    column: str | int | None = None,
    label_column: str | int | None = None,
    factor_columns: Sequence[str | int] | Mapping[str, str | int] = (),
    header: bool | None = None,
    quoting: bool = True,
    delimiter: str | None = None,
    limit: int | None = None,
    on_empty: str = "drop",
) -> SentenceDataset:
    """Read a file of sentences, or a table of them.

    Args:
        path: the file; a name ending in ``.gz`` is decompressed on the way. Or a table in memory, read like jsonl records: a
            DataFrame, a ``datasets.Dataset``, a mapping of columns.
        format: ``"txt"`` (a sentence a line), ``"srl"`` (``sentence & one label per word``), ``"jsonl"`` (an object or
            a string a line), ``"json"`` (a list of them, or a mapping of columns), ``"parquet"``, ``"csv"`` or ``"tsv"``.
            None goes by the file's ending; a ``.txt`` whose first line is in
            SRL form (as many labels as words, a verb or argument among them) is read as SRL. The dataset's report names
            the format read.
        column: the column or JSON field with the sentence: a name, or an index from 0 (csv/tsv). Default: the field
            ``text`` or ``sentence``, or the only column.
        label_column: the column or field with the labels, one per word (space-separated, or a JSON list). Default for
            jsonl: ``labels`` where present; for csv/tsv: none.
        factor_columns: columns or fields to keep as factors: names, indices, or a mapping from factor name to either.
            Default for jsonl: the object ``factors`` where present.
        header: csv/tsv: whether the first row names the columns. None decides: it does when a column is asked for by
            name, or when its cells are distinct single words that start with a letter and are known to be names
            (``text``, ``id``, ``label`` ..); where they may be sentences as well, it asks.
        quoting: csv/tsv: honour double quotes around fields (RFC 4180); False takes them as plain characters.
        delimiter: csv/tsv: what parts fields. None: a comma or tab, or what parts each of the first lines into equally many
            (``;``, ``|`` too).
        limit: stop after this many sentences; nothing after them is read or checked.
        on_empty: ``"drop"`` counts empty sentences in the report, ``"error"`` raises at the first.

    Returns:
        The dataset; ``.report`` counts what was read, kept and dropped.

    Raises:
        DataError: the file is missing, unreadable, empty, not UTF-8, cut off (gzip) or malformed (the message names the
            line); a column does not exist; labels and words differ in number; an option contradicts the format.
    """
    check_options(on_empty, limit)
    if is_table(path):
        named = f"the {type(path).__name__}"
        records = enumerate(table_records(path, named))
        options = (column, label_column, _factor_names(factor_columns))
        rows = _placed(_record_rows(records, named, *options), named, "row")
        return _collected(rows, DataReport(named, "table"), on_empty, limit)
    path = as_path(path, "lf.read", rows="SentenceDataset.from_iterable")
    report = DataReport(str(path), None)
    rows = placed_rows(
        path, report, format=format, column=column, label_column=label_column, factor_columns=factor_columns, header=header,
        quoting=quoting, delimiter=delimiter,
    )  # fmt: skip
    return _collected(rows, report, on_empty, limit)


def placed_rows(
    path: Path,
    report: DataReport,
    *,
    format: str | None = None,
    column: str | int | None = None,
    label_column: str | int | None = None,
    factor_columns: Sequence[str | int] | Mapping[str, str | int] = (),
    header: bool | None = None,
    quoting: bool = True,
    delimiter: str | None = None,
    as_written: bool = False,
) -> Iterator[tuple[str, Any]]:
    """Where each row of a file stands (the file and its line), and what is kept of it, not checked; "" for an empty line.

    report: gets the format read. as_written: the values of factors stay what they are in JSON, None and numbers too, which are
    texts otherwise. The other arguments, and errors, as of :func:`read`.
    """
    if format is not None and format not in FORMATS.values():
        raise DataError("unknown file format", value=repr(format), limit=", ".join(dict.fromkeys(FORMATS.values())))
    chosen = format or _format_of(path)
    if chosen in ("txt", "srl") and (column is not None or label_column is not None or factor_columns):
        raise DataError(
            f"{path}: format {chosen!r} has no columns",
            value=f"column={column!r}, label_column={label_column!r}, factor_columns={factor_columns!r}",
            remedy="give format='csv', 'tsv' or 'jsonl'",
        )
    if delimiter is not None and chosen not in ("csv", "tsv"):
        raise DataError(f"{path}: format {chosen!r} has no delimiter", value=repr(delimiter), remedy="leave it out")
    factors, source = _factor_names(factor_columns), str(path)
    report.format = chosen
    records: Iterable[tuple[int, Any]]
    if chosen in ("json", "parquet"):
        records = enumerate(read_json(path) if chosen == "json" else table_records(read_parquet(path), source))
        rows = _record_rows(records, source, column, label_column, factors, as_written=as_written)
        yield from _placed(rows, source, "record")
        return
    with open_file(path) as file:
        lines = decoded_lines(file, path)
        if chosen == "txt" and format is None:
            lines, is_srl = _looks_like_srl(lines)
            chosen = report.format = "srl" if is_srl else "txt"
        if chosen == "txt":
            rows = lines
        elif chosen == "srl":
            rows = _srl_rows(lines, path)
        elif chosen == "jsonl":
            records = _json_records(lines, path)
            rows = _record_rows(records, source, column, label_column, factors, "line", as_written=as_written)
        else:
            rows = table_rows(lines, path, chosen, column, label_column, factors, header, quoting, delimiter)
        yield from _placed(rows, source, "line")


def _placed(rows: Iterator[tuple[int, Any]], source: str, unit: str) -> Iterator[tuple[str, Any]]:
    """The rows with their place in words; ``unit``: what their numbers count."""
    return ((f"{source}, {unit} {number}", row) for number, row in rows)


def _collected(
    rows: Iterator[tuple[str, Any]], report: DataReport, on_empty: str, limit: int | None
) -> SentenceDataset:
    """The dataset of the rows up to the limit."""
    columns = _Columns()
    for place, row in rows:
        report.read += 1
        columns.add(row, place, on_empty, report)
        if columns.count == limit:
            report.stopped_at_limit = True
            break
    return columns.finish(report)


def _format_of(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    try:
        return FORMATS[suffixes[-1]]
    except (IndexError, KeyError):
        raise DataError(
            f"cannot tell the format of {path} by its name",
            value=path.suffix or "(no ending)",
            limit=", ".join(FORMATS) + ", each also with .gz",
            remedy="give format='txt', 'jsonl', 'csv', 'tsv' or 'srl'",
        ) from None


def _factor_names(columns: Sequence[str | int] | Mapping[str, str | int]) -> dict[str, str | int]:
    if isinstance(columns, Mapping):
        return dict(columns)
    if isinstance(columns, str):
        raise DataError("factor_columns is a single string", value=repr(columns), remedy=f"give [{columns!r}]")
    return {str(column): column for column in columns}


def _looks_like_srl(lines: Iterator[Line]) -> tuple[Iterator[Line], bool]:
    """Whether the first line that is not empty has SRL form; and the lines, all still to be read."""
    seen: list[Line] = []
    is_srl = False
    for line in lines:
        seen.append(line)
        if line[1].strip():
            text, separator, labels = line[1].rpartition(" & ")
            names = labels.split()
            is_srl = bool(separator) and len(names) == len(text.split()) and all(map(_LABEL.fullmatch, names))
            is_srl = is_srl and any(map(_ROLE.fullmatch, names))
            break

    def chained() -> Iterator[Line]:
        yield from seen
        yield from lines

    return chained(), is_srl


def _srl_rows(lines: Iterator[Line], path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        # The sentence may hold an ampersand itself: the labels follow the last one.
        text, separator, labels = line.rpartition("&")
        if not line.strip():
            yield number, ""
        elif not separator:
            raise DataError(
                f"{path}, line {number}: there are no labels",
                value=shorten(line),
                limit="sentence & one label per word",
                remedy="add labels, or read with format='txt'",
            )
        else:
            yield number, {"text": text, "labels": labels.split()} if text.strip() else ""


def _json_records(lines: Iterator[Line], path: Path) -> Iterator[tuple[int, Any]]:
    """What each line holds; an empty line is an empty sentence."""
    for number, line in lines:
        place = f"{path}, line {number}"
        yield number, parse_json(line, place, remedy="one JSON object or string per line") if line.strip() else ""


def _record_rows(
    records: Iterable[tuple[int, Any]],
    source: str,
    column: str | int | None,
    label_column: str | int | None,
    factors: dict[str, str | int],
    unit: str = "record",
    as_written: bool = False,
) -> Iterator[tuple[int, Any]]:
    """What is kept of each numbered record, an object or a string."""
    for wanted in (column, label_column, *factors.values()):
        if wanted is not None and not isinstance(wanted, str):
            raise DataError(f"{source}: a field goes by its name", value=repr(wanted), remedy="give its name")
    for number, record in records:
        place = f"{source}, {unit} {number}"
        if isinstance(record, str) and (column is None or not record):
            yield number, record
            continue
        if not isinstance(record, dict):
            raise DataError(
                f"{place}: not a JSON object",
                value=f"{shorten(json.dumps(record))} ({type(record).__name__})",
                limit="an object with the sentence in a field, or a string",
            )
        name = column if column is not None else next((name for name in TEXT_COLUMNS if name in record), None)
        _require(place, record, *([TEXT_COLUMNS[0]] if name is None else [name]))
        row = {"text": record[name]}
        if label_column is not None:
            _require(place, record, label_column)
            row["labels"] = record[label_column]
        elif "labels" in record:
            row["labels"] = record["labels"]
        if factors:
            _require(place, record, *factors.values())
            found = {factor: record[field] for factor, field in factors.items()}
            row["factors"] = found if as_written else {factor: _as_text(value) for factor, value in found.items()}
        elif "factors" in record:
            row["factors"] = record["factors"]
        yield number, row


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _require(place: str, record: dict[str, Any], *names: Any) -> None:
    missing = [name for name in names if name not in record]
    if missing:
        raise DataError(
            f"{place}: there is no field {', '.join(map(repr, missing))}",
            limit="fields " + (", ".join(map(repr, record)) or "(none)"),
            remedy="name one of these with column=",
        )


def field_names(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    header: bool | None = None,
    quoting: bool = True,
    delimiter: str | None = None,
) -> list[str]:
    """The columns that a csv or tsv file's header names, or the fields of a jsonl file's first object; [] if there are none.

    Arguments and errors as of :func:`read`.
    """
    path = Path(path)
    chosen = format or _format_of(path)
    with open_file(path) as file:
        lines = ((number, text) for number, text in decoded_lines(file, path) if text.strip())
        if chosen == "jsonl":
            first = next((text for _, text in lines), "")
            try:
                record = parse_json(first, str(path)) if first else {}
            except DataError:
                record = {}  # `read` says what is wrong with the line
            return list(record) if isinstance(record, dict) else []
        if chosen not in ("csv", "tsv"):
            return []
        cells = [
            cell.strip() for cell in next(table_reader(lines, path, chosen, delimiter=delimiter, quoting=quoting), [])
        ]
    return cells if cells and (header or (header is None and is_header(cells))) else []
