"""Prompts with their responses: what a conditional VAE is trained on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from lmvae_fast.data.dataset import DataReport, check_options, shorten
from lmvae_fast.data.not_rows import refuse_for_rows
from lmvae_fast.data.stable_random import shuffled
from lmvae_fast.errors import DataError, OutputError


@dataclass(frozen=True)
class PromptResponse:
    """A prompt and one response to it.

    Attributes:
        prompt: what is answered; may be empty.
        response: the answer; not empty.
        label: what the response is known to be (a topic, a rating, a dialogue act), or None.

    Raises DataError when one of them is no string, or the response is empty.
    """

    prompt: str
    response: str
    label: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("prompt", self.prompt), ("response", self.response), ("label", self.label)):
            if not isinstance(value, str) and not (name == "label" and value is None):
                raise DataError(f"a {name} must be a string", value=f"{value!r} ({type(value).__name__})")
        if not self.response.strip():
            raise DataError(
                "a response is empty", value=f"the prompt is {shorten(self.prompt)!r}",
                remedy="drop it, or on_empty='drop'",
            )  # fmt: skip


class PromptDataset(Sequence[PromptResponse]):
    """A sequence of :class:`PromptResponse`; responses to one prompt need not stand together.

    ``dataset[3]`` is a PromptResponse; ``dataset[:100]`` and ``dataset.select(rows)`` are datasets.

    Attributes:
        prompts: the distinct prompts, in the order in which they come first.
        prompt_rows: for each response, the place of its prompt in ``prompts``.
        responses: the responses.
        labels: the label of each response (None where it has none), or None when no response has any.
        report: what was kept and dropped on the way here.
    """

    def __init__(self, rows: Iterable[PromptResponse], report: DataReport | None = None):
        refuse_for_rows(rows, "PromptDataset", reader="lf.read_prompts")
        places: dict[str, int] = {}
        self.prompt_rows: list[int] = []
        self.responses: list[str] = []
        labels: list[str | None] = []
        for row in rows:
            self.prompt_rows.append(places.setdefault(row.prompt, len(places)))
            self.responses.append(row.response)
            labels.append(row.label)
        self.prompts = list(places)
        self.labels = labels if any(label is not None for label in labels) else None
        self.report = report or DataReport("memory", read=len(self), kept=len(self))

    @classmethod
    def from_iterable(cls, rows: Iterable[Any], *, on_empty: str = "drop", limit: int | None = None) -> PromptDataset:
        """Collect prompts with responses.

        Args:
            rows: any iterable, read once, of PromptResponse, pairs (prompt, response), or mappings with ``prompt``, and
                ``response`` or ``responses`` (a list), and perhaps ``label`` or ``labels``.
            on_empty: ``"drop"`` counts empty responses in the report and goes on, ``"error"`` raises.
            limit: keep at most this many responses.

        Raises:
            DataError: a row of another kind, labels and responses of different number, an empty response under
                ``on_empty="error"``, a bad option, or no response at all.
        """
        refuse_for_rows(rows, "PromptDataset.from_iterable", reader="lf.read_prompts")
        places = ((f"row {number}", row) for number, row in enumerate(rows))
        return collect(places, DataReport("iterable"), on_empty, limit)

    def __len__(self) -> int:
        return len(self.responses)

    @overload
    def __getitem__(self, index: int) -> PromptResponse: ...
    @overload
    def __getitem__(self, index: slice) -> PromptDataset: ...
    def __getitem__(self, index: int | slice) -> PromptResponse | PromptDataset:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        label = None if self.labels is None else self.labels[index]
        return PromptResponse(self.prompts[self.prompt_rows[index]], self.responses[index], label)

    def __iter__(self) -> Iterator[PromptResponse]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PromptDataset):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        labelled = "" if self.labels is None else ", with labels"
        return f"PromptDataset({len(self)} responses to {len(self.prompts)} prompts{labelled})"

    def select(self, rows: Iterable[int]) -> PromptDataset:
        """The dataset of these responses, in this order; it carries the same report."""
        return PromptDataset((self[row] for row in rows), self.report)

    def by_prompt(self) -> Iterator[tuple[str, list[PromptResponse]]]:
        """Every prompt with its responses, in the order of ``prompts``."""
        rows: list[list[int]] = [[] for _ in self.prompts]
        for row, place in enumerate(self.prompt_rows):
            rows[place].append(row)
        return ((prompt, [self[row] for row in own]) for prompt, own in zip(self.prompts, rows, strict=True))

    def label_set(self) -> tuple[str, ...]:
        """Every label that occurs, sorted; empty when there are none."""
        return tuple(sorted({label for label in self.labels or () if label is not None}))

    def split(self, *, held_out: float, seed: int = 0) -> tuple[PromptDataset, PromptDataset]:
        """Part the dataset at random into ``(train, held_out)`` with no prompt in both.

        Each part keeps the order of the rows. The parting depends only on the prompts, ``held_out`` and ``seed``.

        Args:
            held_out: share of the distinct prompts that is held out, in (0, 1).
            seed: non-negative integer.

        Raises:
            DataError: the share is out of range, or so few prompts that a part would be empty.
        """
        if not isinstance(held_out, (int, float)) or not 0.0 < held_out < 1.0:
            raise DataError(
                "held_out is out of range", value=held_out, limit="0 < held_out < 1, a share of the prompts"
            )
        count = round(held_out * len(self.prompts))
        if count in (0, len(self.prompts)):
            raise DataError(
                "a part of the split would be empty", value=f"{len(self.prompts)} prompts with held_out={held_out}",
                remedy="use more prompts or another share",
            )  # fmt: skip
        outside = set(shuffled(range(len(self.prompts)), seed)[:count])
        return (
            self.select(row for row, place in enumerate(self.prompt_rows) if place not in outside),
            self.select(row for row, place in enumerate(self.prompt_rows) if place in outside),
        )

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the content in order: the key of every cache, wherever the rows came from."""
        digest = hashlib.sha256(b"lmvae_fast.data prompts 1\n")
        for row in self:
            digest.update(json.dumps([row.prompt, row.response, row.label]).encode("ascii") + b"\n")
        return digest.hexdigest()

    def write_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object per prompt (``prompt``, ``responses``, and ``labels`` where known); ``read_prompts`` reads
        it back, prompt by prompt.

        Raises OutputError when the file cannot be written.
        """
        try:
            with Path(path).open("w", encoding="utf-8", newline="\n") as file:
                for prompt, rows in self.by_prompt():
                    record: dict[str, Any] = {"prompt": prompt, "responses": [row.response for row in rows]}
                    if self.labels is not None:
                        record["labels"] = [row.label for row in rows]
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {error.strerror or error}", remedy="choose another path"
            ) from error


def collect(
    rows: Iterable[tuple[str, Any]], report: DataReport, on_empty: str, limit: int | None = None
) -> PromptDataset:
    """A dataset of rows that come with a name for their place (``line 7``); arguments and errors of ``from_iterable``."""
    check_options(on_empty, limit)
    kept: list[PromptResponse] = []
    for place, row in rows:
        for pair in _pairs(row, place):
            report.read += 1
            if not pair[1].strip():
                if on_empty == "error":
                    raise DataError(f"{place}: the response is empty", remedy="mend it, or choose on_empty='drop'")
                report.drop("empty response", place)
                continue
            kept.append(PromptResponse(*pair))
            if len(kept) == limit:
                report.stopped_at_limit = True
                break
        if report.stopped_at_limit:
            break
    report.kept = len(kept)
    if not kept:
        raise DataError(f"{report.source}: there is no response", value=str(report), remedy="check the data's source")
    return PromptDataset(kept, report)


def _pairs(row: Any, place: str) -> list[tuple[str, str, str | None]]:
    """Prompt, response and label of every response in a row; DataError for anything but strings."""
    if isinstance(row, PromptResponse):
        return [(row.prompt, row.response, row.label)]
    if isinstance(row, Mapping):
        missing = "prompt" not in row or not ({"response", "responses"} & row.keys())
        if missing or {"response", "responses"} <= row.keys():
            labels_alone = missing and {"label", "labels"} & row.keys()
            raise DataError(
                f"{place}: {'labels without text' if labels_alone else 'not a prompt with its responses'}",
                value=f"fields {', '.join(map(repr, row)) or '(none)'}",
                limit="prompt, and response or responses; label or labels beside them",
            )
        responses = row["responses"] if "responses" in row else [row["response"]]
        labels = row.get("labels", [row["label"]] if "label" in row else None)
        if labels is not None and not isinstance(labels, Sequence):
            raise DataError(
                f"{place}: labels must be a list",
                value=f"{labels!r} ({type(labels).__name__})",
                limit="a list, or null",
            )
        if isinstance(responses, str) or not isinstance(responses, Sequence):
            raise DataError(
                f"{place}: responses must be a list", value=type(responses).__name__, limit="a list of strings"
            )
        if labels is not None and (isinstance(labels, str) or len(labels) != len(responses)):
            raise DataError(
                f"{place}: labels and responses differ in number",
                value=f"{1 if isinstance(labels, str) else len(labels)} labels", limit=f"{len(responses)} responses",
                remedy="give one label per response, null where none is known, or leave them out",
            )  # fmt: skip
        labels = [None] * len(responses) if labels is None else [None if x is None else str(x) for x in labels]
        pairs = [(row["prompt"], response, label) for response, label in zip(responses, labels, strict=True)]
    elif isinstance(row, tuple) and len(row) == 2:
        pairs = [(*row, None)]
    else:
        raise DataError(
            f"{place}: not a prompt with a response", value=f"{type(row).__name__} {shorten(str(row))}",
            limit="a PromptResponse, a pair of strings, or a mapping with prompt and response",
        )  # fmt: skip
    for prompt, response, _ in pairs:
        for name, value in (("prompt", prompt), ("response", response)):
            if not isinstance(value, str):
                raise DataError(f"{place}: a {name} must be a string", value=f"{value!r} ({type(value).__name__})")
    return pairs
