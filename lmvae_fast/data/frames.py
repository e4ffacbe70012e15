"""Tables that are in memory already, and files that libraries read as tables: DataFrames, datasets, parquet, JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmvae_fast.data.not_rows import is_table
from lmvae_fast.data.tables import TEXT_COLUMNS
from lmvae_fast.documents import check_regular, parse_json, read_text
from lmvae_fast.errors import DataError
from lmvae_fast.optional import require


def table_columns(table: Any) -> dict[str, Sequence[Any]]:
    """The columns of a table by name, alike in length. Raises DataError for anything else."""
    if not is_table(table):
        raise DataError("this is no table", value=type(table).__name__, limit="columns by name")
    names = table if isinstance(table, Mapping) else getattr(table, "column_names", None)
    names = list(table.columns if names is None else names)
    values = {str(name): table[name] for name in names}
    columns: dict[str, Sequence[Any]] = {
        n: list(v) for n, v in values.items() if hasattr(v, "__iter__") and not isinstance(v, (str, Mapping))
    }
    lengths = {name: len(column) for name, column in columns.items()}
    if len(columns) != len(names) or len(set(lengths.values())) > 1:
        raise DataError(
            "the values of this mapping are no columns",
            value=lengths or ", ".join(map(str, names)),
            limit="sequences of one length",
            remedy="for sentences by key give list(mapping.values())",
        )
    return columns


def table_records(table: Any, source: str) -> Iterable[dict[str, Any]]:
    """The rows of a table as mappings of column to value, absent values as empty strings. Raises DataError."""
    columns = table_columns(table)
    if not columns:
        raise DataError(f"{source} has no columns", limit=", ".join(TEXT_COLUMNS))
    for values in zip(*columns.values(), strict=True):
        yield {name: "" if _absent(value) else value for name, value in zip(columns, values, strict=True)}


def read_parquet(path: Path) -> Any:
    """A parquet file as a table; DataError where it is damaged, MissingPackageError without pyarrow."""
    parquet = require("pyarrow.parquet", purpose="reading parquet files", package="pyarrow")
    check_regular(path)
    try:
        table = parquet.read_table(path)
    except Exception as error:  # pyarrow's own errors are of many kinds
        raise DataError(f"cannot read {path}: {error}", remedy="check the path, or write the file again") from error
    return {name: table.column(name).to_pylist() for name in table.column_names}


def read_json(path: Path) -> list[Any]:
    """A JSON file that is a list of records or sentences, or a mapping of columns; DataError for anything else."""
    value = parse_json(
        read_text(path), f"{path} is no JSON file", remedy="mend it; for one object a line use the ending .jsonl"
    )
    if isinstance(value, dict):
        return list(table_records(value, str(path)))
    if isinstance(value, list):
        return value
    raise DataError(f"{path} holds no list", value=type(value).__name__, limit="a list of objects or strings")


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
