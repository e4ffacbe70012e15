"""What is no collection of rows: one text, a path, a table whose iteration gives the names of its columns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lmvae_fast.errors import DataError


def is_table(value: Any) -> bool:
    """Whether a value is a table of named columns: a mapping of columns, a DataFrame, or a ``datasets.Dataset``."""
    return isinstance(value, Mapping) or hasattr(value, "columns") or hasattr(value, "column_names")


def refuse_for_rows(rows: Any, where: str, *, reader: str = "lf.read") -> None:
    """Raises DataError for what would give its characters, keys or column names for rows, and for what gives none."""
    if isinstance(rows, (str, bytes)):
        raise DataError(
            f"{where} takes rows, and this is one text", value=repr(rows[:40]),
            remedy=f"wrap it: [text]; {reader}(path) reads a file",
        )  # fmt: skip
    if isinstance(rows, os.PathLike):
        raise DataError(f"{where} takes rows, and this is a path", value=rows, remedy=f"{reader}(path) reads a file")
    if is_table(rows):
        raise DataError(
            f"{where} takes rows one by one, and this is a table or a mapping", value=type(rows).__name__,
            limit="an iterable of rows, each of which may be a mapping",
            remedy=f"{reader}(table) takes DataFrames, datasets and mappings of columns",
        )  # fmt: skip
    if not isinstance(rows, Iterable):
        raise DataError(
            f"{where} takes rows, and this has none", value=type(rows).__name__, limit="an iterable of rows"
        )


def as_path(path: Any, reader: str, *, rows: str) -> Path:
    """The path; DataError for anything else, with the maker of a dataset from ``rows`` in memory."""
    if not isinstance(path, (str, os.PathLike)):
        raise DataError(
            f"{reader} takes the path of a file, or a table", value=type(path).__name__,
            limit="a path, a DataFrame, a datasets.Dataset, a mapping of columns", remedy=f"for rows use {rows}",
        )  # fmt: skip
    return Path(path)
