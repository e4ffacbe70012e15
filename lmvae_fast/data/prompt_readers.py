"""Reading prompts with responses: JSON lines, tables, dialogues, and texts that are cut into prompt and rest later.

Layouts and templates of the public code of CVAE with G-Skip (zhangjf-nlp/LLM-based-CVAE, CVAE.md of its data section).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmvae_fast.data.dataset import DataReport, check_options, shorten
from lmvae_fast.data.delimiters import table_reader
from lmvae_fast.data.frames import table_records
from lmvae_fast.data.lines import Line, decoded_lines, open_file
from lmvae_fast.data.not_rows import as_path, is_table
from lmvae_fast.data.prompts import PromptDataset, collect
from lmvae_fast.documents import parse_json
from lmvae_fast.errors import DataError
from lmvae_fast.limits import whole_number

LAYOUTS = ("jsonl", "tsv", "csv", "dailydialog", "plato")
COLUMNS = ("prompt", "response")
TEXT_LAYOUTS = ("yelp", "agnews")
TURN_END = "<|eot_id|>"
_TURN = "__eou__"


class Lengths(NamedTuple):
    """Tokens kept of a prompt (begin-of-text included) and of a response."""

    prompt: int
    response: int


#: The published runs' lengths.
LENGTHS = {
    "agnews": Lengths(8, 32), "yelp": Lengths(32, 128), "dailydialog": Lengths(256, 36), "plato": Lengths(256, 50)
}  # fmt: skip
#: What the labels of a set stand for, in the order of their numbers (AGNews and DailyDialog's files count from 1).
LABELS = {
    "agnews": ("world", "sports", "business", "science and technology"),
    "yelp": ("1 star", "2 stars", "3 stars", "4 stars", "5 stars"),
    "dailydialog": ("inform", "question", "directive", "commissive"),
}


class LabelledText(NamedTuple):
    """A text that is no pair yet, and its label or None."""

    text: str
    label: str | None


# What a tokeniser of words put a space before.
_SPACED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def without_token_spaces(text: str) -> str:
    """A text without the spaces that tokenisation into words put before punctuation and clitics, stripped."""
    for spaced, joined in _SPACED:
        text = text.replace(spaced, joined)
    return text.strip()


def read_prompts(
    path: str | os.PathLike[str] | Any,
    *,
    layout: str | None = None,
    columns: Sequence[str | int] = COLUMNS,
    label_column: str | int | None = None,
    acts: str | os.PathLike[str] | None = None,
    turn_end: str = TURN_END,
    delimiter: str | None = None,
    limit: int | None = None,
    on_empty: str = "drop",
) -> PromptDataset:
    """Read a file of prompts with responses.

    Args:
        path: the file; a name ending in ``.gz`` is decompressed on the way. Or a table in memory, read like jsonl records: a
            DataFrame, a ``datasets.Dataset``, a mapping of columns.
        layout: ``"jsonl"``: an object a line with ``prompt``, and ``response`` or ``responses``, and perhaps ``label`` or
            ``labels``; ``"tsv"`` or ``"csv"``: a pair a row; ``"dailydialog"``: a dialogue a line, every utterance ending
            in ``__eou__``: each utterance after the first answers all before it; ``"plato"``: the turns of a prompt
            parted by ``__eou__``, a tab, the response. None: by the file's ending (jsonl, tsv, csv).
        columns: tsv, csv: prompt and response, by name (the first row then names the columns) or index from 0.
        label_column: tsv, csv: the label, by name or index.
        acts: dailydialog: the file of dialogue acts, a number per utterance, whose lines are those of ``path``.
        turn_end: what every turn of a dialogue ends in: a chat format's mark or an added special token of the decoder's;
            one that is its start, end, padding or unknown token is read as text.
        delimiter: tsv, csv: what parts fields; None: a tab or comma, or what parts each of the first lines into equally many.
        limit: stop after this many responses.
        on_empty: ``"drop"`` counts empty responses in the report, ``"error"`` raises at the first.

    Returns:
        The dataset; ``.report`` counts what was read, kept and dropped.

    Raises:
        DataError: the file cannot be read or is malformed (naming the line); labels and texts differ in number; a column
            does not exist; an option contradicts the layout.
    """
    check_options(on_empty, limit)
    if is_table(path):
        return _read_table(path, layout, columns, label_column, on_empty, limit)
    path = as_path(path, "lf.read_prompts", rows="PromptDataset.from_iterable")
    layout = layout or {".jsonl": "jsonl", ".ndjson": "jsonl", ".tsv": "tsv", ".csv": "csv"}.get(_ending(path))
    if layout not in LAYOUTS:
        raise DataError(
            f"cannot tell the layout of {path}" if layout is None else "unknown layout", value=layout or path.suffix,
            limit=", ".join(LAYOUTS), remedy=f"give layout=; {' and '.join(TEXT_LAYOUTS)} are read by read_texts",
        )  # fmt: skip
    if acts is not None and layout != "dailydialog":
        raise DataError("acts belong to layout='dailydialog'", value=f"layout={layout!r}", remedy="leave them out")
    if label_column is not None and layout not in ("tsv", "csv"):
        raise DataError("label_column belongs to tables", value=f"layout={layout!r}", remedy="leave it out")
    if delimiter is not None and layout not in ("tsv", "csv"):
        raise DataError("delimiter belongs to tables", value=f"layout={layout!r}", remedy="leave it out")
    with open_file(path) as file:
        lines = decoded_lines(file, path)
        rows: Iterator[tuple[str, Any]]
        if layout == "jsonl":
            rows = _json_rows(lines, path)
        elif layout == "dailydialog":
            rows = _dialogue_rows(lines, path, None if acts is None else Path(acts), turn_end)
        elif layout == "plato":
            rows = _plato_rows(lines, path, turn_end)
        else:
            rows = _table_rows(lines, path, layout, columns, label_column, delimiter)
        return collect(rows, DataReport(str(path), layout), on_empty, limit)


def read_texts(
    path: str | os.PathLike[str], *, layout: str, parity: str | None = None, limit: int | None = None
) -> list[LabelledText]:
    """Read labelled texts that are cut into prompt and response by tokens (``cut_texts``).

    Args:
        path: the file; a name ending in ``.gz`` is decompressed on the way.
        layout: ``"yelp"``: label, tab, text; ``"agnews"``: a table (class 1 to 4, title, description), which are joined
            by a space, or an object a line with ``text`` and ``label``.
        parity: ``"even"`` or ``"odd"``: only those rows, counted from 0: validation and test set of AGNews.
        limit: stop after this many texts.

    Texts are cleaned of tokenisation spaces and stripped; empty ones are left out.

    Raises:
        DataError: the file cannot be read or is malformed (naming the line); a label without a text; an unknown option.
    """
    path = as_path(path, "read_texts", rows="cut_texts")
    if layout not in TEXT_LAYOUTS:
        raise DataError("unknown layout of texts", value=repr(layout), limit=", ".join(TEXT_LAYOUTS))
    if parity not in (None, "even", "odd"):
        raise DataError("unknown parity", value=repr(parity), limit="even, odd, or None")
    check_options("drop", limit)
    found: list[LabelledText] = []
    with open_file(path) as file:
        lines = decoded_lines(file, path)
        rows = _yelp_rows(lines, path) if layout == "yelp" else _agnews_rows(lines, path)
        for number, row in enumerate(rows):
            if parity is not None and number % 2 != (parity == "odd"):
                continue
            if row.text:
                found.append(row)
            if len(found) == limit:
                break
    if not found:
        raise DataError(f"{path} holds no text", limit="at least one", remedy="check the file and its layout")
    return found


def _read_table(
    table: Any,
    layout: str | None,
    columns: Sequence[str | int],
    label_column: str | int | None,
    on_empty: str,
    limit: int | None,
) -> PromptDataset:
    """The dataset of a table in memory, whose columns go by their names."""
    named = f"the {type(table).__name__}"
    if (
        layout is not None
        or len(columns) != 2
        or not all(isinstance(name, (str, type(None))) for name in (*columns, label_column))
    ):
        raise DataError(
            f"{named} has no layout, and its columns go by their names", value=f"{layout}, {columns}, {label_column}",
            remedy="leave layout out, and give names",
        )  # fmt: skip
    wanted = {"prompt": columns[0], "response": columns[-1], "label": label_column or "label"}

    def rows() -> Iterator[tuple[str, Any]]:
        for number, record in enumerate(table_records(table, named)):
            given = [*(columns if tuple(columns) != COLUMNS else ()), *([] if label_column is None else [label_column])]
            if missing := [name for name in given if name not in record]:
                raise DataError(
                    f"{named}: there is no column {', '.join(map(repr, missing))}", limit=", ".join(map(repr, record)),
                    remedy="name the columns of prompt and response",
                )  # fmt: skip
            own = {name: record[column] for name, column in wanted.items() if column in record}
            row = own if "responses" not in record or "response" in own else record
            yield f"{named}, row {number}", {**row, "label": row.get("label") or None} if "label" in row else row

    return collect(rows(), DataReport(named, "table"), on_empty, limit)


def _ending(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _json(line: str, place: str) -> dict[str, Any]:
    record = parse_json(line, place, remedy="one JSON object a line")
    if not isinstance(record, dict):
        raise DataError(f"{place}: not a JSON object", value=shorten(line), limit="an object with prompt and response")
    return record


def _json_rows(lines: Iterator[Line], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in lines:
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _json(line, place)


def _table_rows(
    lines: Iterator[Line],
    path: Path,
    layout: str,
    columns: Sequence[str | int],
    label_column: str | int | None,
    delimiter: str | None,
) -> Iterator[tuple[str, Any]]:
    wanted = [*columns, *([] if label_column is None else [label_column])]
    if len(columns) != 2:
        raise DataError("columns are those of prompt and response", value=list(columns), limit="two names or indices")
    table = table_reader(lines, path, layout, delimiter=delimiter, quoting=layout == "csv")
    names: list[str] | None = None
    try:
        for cells in table:
            place = f"{path}, line {table.line_num}"
            if not "".join(cells).strip():
                continue
            if names is None and any(isinstance(column, str) for column in wanted):
                names = [cell.strip() for cell in cells]
                continue
            prompt, response, *label = (_cell(cells, column, names, place) for column in wanted)
            yield (
                place,
                {"prompt": prompt, "response": response, "label": (label[0].strip() or None) if label else None},
            )
    except csv.Error as error:
        raise DataError(f"{path}, line {table.line_num}: malformed {layout}: {error}", remedy="mend the line") from None


def _cell(cells: list[str], column: str | int, names: list[str] | None, place: str) -> str:
    index = names.index(column) if isinstance(column, str) and names and column in names else column
    if not isinstance(index, int) or not 0 <= index < len(cells):
        raise DataError(
            f"{place}: there is no column {column!r}", value=f"{len(cells)} cells",
            limit=", ".join(names) if names else "indices from 0", remedy="name the columns of prompt and response",
        )  # fmt: skip
    return cells[index]


def _dialogue_rows(lines: Iterator[Line], path: Path, acts: Path | None, turn_end: str) -> Iterator[tuple[str, Any]]:
    """Every utterance after a dialogue's first with all before it; with its act where there is a file of them."""
    if acts is None:
        yield from _utterances(((line, None) for line in lines), path, turn_end)
        return
    with open_file(acts) as file:
        both = _paired(lines, decoded_lines(file, acts), path, acts)
        yield from _utterances(both, path, turn_end)


def _paired(
    lines: Iterator[Line], acts: Iterator[Line], path: Path, acts_path: Path
) -> Iterator[tuple[Line, list[str] | None]]:
    for line in lines:
        act = next(acts, None)
        if act is None:
            raise DataError(
                f"{path}, line {line[0]}: {acts_path} has no acts for it", remedy="give the two files of one set"
            )
        yield line, act[1].split()
    rest = next(acts, None)
    if rest is not None:
        raise DataError(
            f"{acts_path}, line {rest[0]}: labels without text", value=shorten(rest[1]), limit=f"lines of {path}"
        )


def _utterances(lines: Iterator[tuple[Line, list[str] | None]], path: Path, turn_end: str) -> Iterator[tuple[str, Any]]:
    for (number, line), acts in lines:
        place = f"{path}, line {number}"
        turns = [without_token_spaces(turn) for turn in line.split(_TURN)]
        if turns and not turns[-1]:  # what follows the last mark
            turns.pop()
        if acts is not None and len(acts) != len(turns):
            raise DataError(
                f"{place}: labels and utterances differ in number", value=f"{len(acts)} labels", limit=len(turns)
            )
        prompt = ""
        for turn, text in enumerate(turns):
            response = text + turn_end if text else ""
            if turn:
                label = None if acts is None else _named("dailydialog", acts[turn], place)
                yield place, {"prompt": prompt, "response": response, "label": label}
            prompt += response


def _plato_rows(lines: Iterator[Line], path: Path, turn_end: str) -> Iterator[tuple[str, Any]]:
    for number, line in lines:
        if not line.strip():
            continue
        place, cells = f"{path}, line {number}", line.rstrip("\r\n ").split("\t")
        while len(cells) > 2 and not cells[-1].strip():
            cells.pop()
        if len(cells) != 2:
            raise DataError(f"{place}: not a prompt, a tab and a response", value=f"{len(cells)} cells", limit=2)
        prompt = cells[0].replace(f" {_TURN} ", turn_end).strip() + turn_end
        response = cells[1].strip()
        yield place, (prompt, response + turn_end if response else "")


def _yelp_rows(lines: Iterator[Line], path: Path) -> Iterator[LabelledText]:
    for number, line in lines:
        label, tab, text = line.partition("\t")
        if not line.strip():
            continue
        if not tab or not text.strip():
            raise DataError(
                f"{path}, line {number}: {'a label without text' if tab else 'no tab'}", value=shorten(line),
                limit="label, tab, text", remedy="mend the line",
            )  # fmt: skip
        yield LabelledText(without_token_spaces(text), label.strip())


def _agnews_rows(lines: Iterator[Line], path: Path) -> Iterator[LabelledText]:
    if _ending(path) in (".jsonl", ".ndjson"):
        for place, record in _json_rows(lines, path):
            if not isinstance(record.get("text"), str) or "label" not in record:
                raise DataError(
                    f"{place}: {'a label without text' if 'label' in record else 'no label'}", limit="text, label"
                )
            yield LabelledText(without_token_spaces(record["text"]), str(record["label"]))
        return
    table = csv.reader((text + "\n" for _, text in lines))
    try:
        for cells in table:
            place = f"{path}, line {table.line_num}"
            if not "".join(cells).strip() or cells[0].strip().lower() in ("class index", "label"):
                continue
            if len(cells) < 2:
                raise DataError(f"{place}: a label without text", value=cells, limit="class, title, description")
            yield LabelledText(without_token_spaces(" ".join(cells[1:])), _named("agnews", cells[0].strip(), place))
    except csv.Error as error:
        raise DataError(f"{path}, line {table.line_num}: malformed csv: {error}", remedy="mend the line") from None


def _named(layout: str, number: str, place: str) -> str:
    """The label that a number stands for, counted from 1."""
    names = LABELS[layout]
    which = whole_number(number)
    if which is None or not 1 <= which <= len(names):
        raise DataError(f"{place}: unknown label of {layout}", value=repr(number[:80]), limit=f"1 to {len(names)}")
    return names[which - 1]
