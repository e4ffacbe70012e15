"""LangVAE's datasets: sentences as one-hot or id tensors of the decoder's tokenizer, and how they are collated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lmvae_fast.data.lines import decoded_lines, open_file
from lmvae_fast.documents import parse_json, read_text
from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.files import output_errors, replacing
from lmvae_fast.integrations.langvae.containers import DatasetOutput

# What a batch holds beside annotations.
FIELDS = ("data", "input_ids", "attention_mask")


class TokenizedDataSet(Dataset):
    """Sentences under a decoder's tokenizer.

    ``dataset[i]`` and ``dataset[a:b]`` are a :class:`DatasetOutput` with ``data`` (and the same as ``input_ids``), sparse
    int8 ``[n, tokens, vocabulary]``, one-hot, and ``attention_mask`` int64 ``[n, tokens]``; rows shorter than the longest
    have no entry past their end. All sentences are tokenised at the first access.

    Args:
        source: strings, or SAF sentences (anything with ``surface``).
        tokenizer: of the decoder (``decoder.tokenizer``); given a padding token, its end token, where it has none.
        max_len: the most tokens kept of a sentence.
        caching: keep what was tokenised. It is always kept; False only means that no file is written.
        cache_persistence: with ``caching``, a JSON lines file that keeps it for the next run.
        return_tensors: False gives lists of ids, with ``one_hot=False``.
        one_hot: False gives ids, padded with the tokenizer's padding token.
        tokenizer_options: further arguments of the tokenizer's call.

    Raises:
        DataError: a sentence of another kind, or one without tokens. ConfigError: options that contradict each other.
    """

    def __init__(
        self,
        source: Sequence[Any],
        tokenizer: Any,
        max_len: int,
        caching: bool = False,
        cache_persistence: str | None = None,
        return_tensors: bool = True,
        one_hot: bool = True,
        tokenizer_options: Mapping[str, Any] | None = None,
    ):
        if one_hot and not return_tensors:
            raise ConfigError(
                "one-hot rows are tensors",
                value="one_hot=True, return_tensors=False",
                remedy="set one_hot=False for ids",
            )
        if not callable(tokenizer) or not hasattr(tokenizer, "get_vocab"):
            raise ConfigError(
                "tokenizer must be a Hugging Face tokenizer", value=type(tokenizer).__name__,
                remedy="pass decoder.tokenizer",
            )  # fmt: skip
        if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
            source = list(source)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.source, self.tokenizer, self.max_len = source, tokenizer, max_len
        self.caching, self.return_tensors, self.one_hot = caching, return_tensors, one_hot
        self.cache_persistence = cache_persistence or ""
        # These two would change what a row is; padding and tensors are made here.
        shape = ("return_tensors", "padding")
        self.tokenizer_options = {k: v for k, v in (tokenizer_options or {}).items() if k not in shape}
        self.vocab_size = len(tokenizer.get_vocab())
        self._ids: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int | slice) -> DatasetOutput:
        return self._output(self._rows(index))

    @property
    def ids(self) -> list[list[int]]:
        """Token ids of every sentence, special tokens included where the tokenizer writes them."""
        if self._ids is None:
            self._ids = self._tokenized()
        return self._ids

    def _rows(self, index: int | slice) -> list[int]:
        if isinstance(index, slice):
            return list(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return [index % len(self)]

    def _output(self, rows: list[int], **annotations: Tensor) -> DatasetOutput:
        ids = [self.ids[row] for row in rows]
        longest = max(map(len, ids), default=0)
        if self.one_hot:
            data: Any = one_hot(ids, longest, self.vocab_size)
        elif self.return_tensors:
            data = torch.tensor([row + [self.tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
        else:
            mask = [[1] * len(row) for row in ids]
            return DatasetOutput(data=ids, input_ids=ids, attention_mask=mask, **annotations)
        places = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        return DatasetOutput(data=data, input_ids=data, attention_mask=places, **annotations)

    def _texts(self) -> list[Any]:
        """What the tokenizer reads of every row."""
        texts = [getattr(item, "surface", item) for item in self.source]
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(
                    f"row {row} is no sentence", value=type(text).__name__, limit="a string, or an object with surface"
                )
        return texts

    def _call(self, texts: list[Any]) -> list[list[int]]:
        options = {"truncation": True, "max_length": self.max_len, **self.tokenizer_options}
        return [list(ids) for ids in self.tokenizer(texts, **options)["input_ids"]]

    def _tokenized(self) -> list[list[int]]:
        texts = self._texts()
        keep = bool(self.caching and self.cache_persistence)
        known = _read_cache(Path(self.cache_persistence)) if keep else {}
        rules = self._rules() if keep else ""
        keys = [hashlib.blake2b(json.dumps([rules, text]).encode(), digest_size=16).hexdigest() for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if not keep or key not in known}
        if not keep:
            ids = self._call(texts) if texts else []
        else:
            made = dict(zip(missing, self._call(list(missing.values())) if missing else [], strict=True))
            if made:
                _append_cache(Path(self.cache_persistence), made)
            ids = [made[key] if key in made else known[key] for key in keys]
        empty = [row for row, sentence in enumerate(ids) if not sentence]
        if empty:
            raise DataError(f"sentence {empty[0]} has no tokens", value=repr(texts[empty[0]]), remedy="leave it out")
        return ids

    def _rules(self) -> str:
        """All that decides a sentence's ids besides its text."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules: Any = sorted(self.tokenizer.get_vocab().items())
        if backend is not None:
            # Without these two: a tokenizer remembers how it was last called.
            rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
        options = json.dumps(self.tokenizer_options, sort_keys=True, default=str)
        return hashlib.sha256(f"{json.dumps(rules)} {self.max_len} {options}".encode()).hexdigest()


class TokenizedAnnotatedDataSet(TokenizedDataSet):
    """Sentences of words with a label for each, under a decoder's tokenizer.

    A row holds, besides what :class:`TokenizedDataSet` gives, one field per kind of annotation: sparse int8
    ``[n, tokens, labels]``, one-hot, the label of word i in place i.

    Args:
        source: ``(words, labels)``, two lists of lists of strings; or SAF sentences (``tokens`` with ``surface`` and
            ``annotations``).
        annotations: kind -> its labels, in the order of their columns. ``(words, labels)`` has the first kind only.
        others: as :class:`TokenizedDataSet`.

    Raises:
        DataError: words and labels differ in number, or a label is unknown.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: Any,
        max_len: int,
        annotations: Mapping[str, Sequence[str]],
        caching: bool = False,
        cache_persistence: str | None = None,
        return_tensors: bool = True,
        one_hot: bool = True,
        tokenizer_options: Mapping[str, Any] | None = None,
    ):
        if not annotations or not isinstance(annotations, Mapping):
            raise ConfigError(
                "annotations must name a kind and its labels", value=repr(annotations)[:100], limit='{"srl": [...]}'
            )
        if not one_hot:
            raise ConfigError("annotations are one-hot", value="one_hot=False", remedy="leave one_hot at True")
        pairs = source if isinstance(source, tuple) else None
        if pairs is not None and (len(pairs) != 2 or len(pairs[0]) != len(pairs[1]) or len(annotations) != 1):
            raise DataError(
                "source must be (words, labels) of one kind of annotation",
                value=f"{[len(part) for part in pairs]} rows, {len(annotations)} kinds",
                limit="two lists of the same length, one kind",
            )
        super().__init__(
            list(pairs[0]) if pairs is not None else source, tokenizer, max_len, caching, cache_persistence,
            return_tensors, one_hot, tokenizer_options,
        )  # fmt: skip
        self.annotations = {kind: list(labels) for kind, labels in annotations.items()}
        self._labels = None if pairs is None else pairs[1]

    def __getitem__(self, index: int | slice) -> DatasetOutput:
        rows = self._rows(index)
        longest = max((len(self.ids[row]) for row in rows), default=0)
        columns = {
            kind: one_hot([self.label_ids(row, kind)[:longest] for row in rows], longest, len(labels))
            for kind, labels in self.annotations.items()
        }
        return self._output(rows, **columns)

    def label_ids(self, row: int, kind: str) -> list[int]:
        """Column of each word's label, at most ``max_len`` of them."""
        names, known = self._label_names(row, kind), self.annotations[kind]
        if len(names) != len(self._words(row)):
            raise DataError(
                f"row {row}: words and labels differ in number", value=len(names), limit=len(self._words(row))
            )
        unknown = [name for name in names if name not in known]
        if unknown:
            raise DataError(
                f"row {row} has an unknown label", value=repr(unknown[0]), limit=", ".join(map(repr, known)),
                remedy=f"add it to annotations[{kind!r}]",
            )  # fmt: skip
        return [known.index(name) for name in names][: self.max_len]

    def _words(self, row: int) -> list[str]:
        item = self.source[row]
        return list(item) if self._labels is not None else [token.surface for token in item.tokens]

    def _label_names(self, row: int, kind: str) -> list[str]:
        if self._labels is not None:
            return list(self._labels[row])
        item = self.source[row]
        of_sentence = getattr(item, "annotations", None) or {}
        if kind in of_sentence:
            return list(of_sentence[kind])
        return [token.annotations.get(kind, " ") for token in item.tokens]

    def _texts(self) -> list[Any]:
        # A space before each word: to tokenizers of bytes that is how a word begins.
        return [[f" {word}" for word in self._words(row)] for row in range(len(self.source))]

    def _call(self, texts: list[Any]) -> list[list[int]]:
        options = {
            "truncation": True,
            "max_length": self.max_len,
            "is_split_into_words": True,
            **self.tokenizer_options,
        }
        return [list(ids) for ids in self.tokenizer(texts, **options)["input_ids"]]


def one_hot(ids: Sequence[Sequence[int]], longest: int, width: int) -> Tensor:
    """Sparse int8 ``[rows, longest, width]`` with a 1 for each id."""
    rows = [row for row, sentence in enumerate(ids) for _ in sentence]
    places = [place for sentence in ids for place in range(len(sentence))]
    columns = [column for sentence in ids for column in sentence]
    ones = torch.ones(len(rows), dtype=torch.int8)
    indices = torch.tensor([rows, places, columns], dtype=torch.int64).view(3, -1)
    return torch.sparse_coo_tensor(indices, ones, (len(ids), longest, width), check_invariants=True)


def collate_sparse_fn(batch: Sequence[Any], *, collate_fn_map: Any = None) -> Any:
    """One batch of rows of these datasets, padded with nothing (no entry, 0) to its longest; anything else as it is.

    Raises ConfigError for ``collate_fn_map``, which nothing could be done with.
    """
    if collate_fn_map is not None:
        raise ConfigError("collate_fn_map is not used by this collation", value=repr(collate_fn_map)[:80])
    if not batch or not isinstance(batch[0], Mapping):
        return batch
    out: dict[str, Any] = {}
    for name in batch[0]:
        parts = [row[name] for row in batch]
        if not isinstance(parts[0], Tensor):
            out[name] = [part[0] for part in parts]
        elif parts[0].is_sparse:
            out[name] = _stack_sparse(parts)
        else:
            longest = max(part.shape[1] for part in parts)
            padded = [torch.cat([p, p.new_zeros(p.shape[0], longest - p.shape[1], *p.shape[2:])], 1) for p in parts]
            out[name] = torch.cat(padded)
    return DatasetOutput(out)


def _stack_sparse(parts: Sequence[Tensor]) -> Tensor:
    size = (sum(p.shape[0] for p in parts), max(p.shape[1] for p in parts), *parts[0].shape[2:])
    indices, values, first = [], [], 0
    for part in parts:
        part = part.coalesce()
        where = part.indices().clone()
        where[0] += first
        indices.append(where)
        values.append(part.values())
        first += part.shape[0]
    return torch.sparse_coo_tensor(torch.cat(indices, 1), torch.cat(values), size, check_invariants=True)


def token_ids(data: Any, pad_token_id: int) -> tuple[list[list[int]], int]:
    """Ids of each sentence in a batch's ``data``, without its padding, and how many places a row has.

    data: sparse or dense one-hot ``[B, S, V]``, ids ``[B, S]``, or lists of ids. Raises DataError for anything else.
    """
    if not isinstance(data, Tensor):
        rows = [[int(token) for token in row] for row in data]
        return rows, max(map(len, rows), default=0)
    if data.dim() == 3 and data.is_sparse:
        data = data.coalesce()
        rows = [[] for _ in range(data.shape[0])]
        for row, _, column in data.indices().t().tolist():
            rows[row].append(column)
        return rows, data.shape[1]
    if data.dim() == 3:
        data = data.argmax(-1)
    if data.dim() != 2 or data.is_floating_point():
        raise DataError(
            "a batch's data must be tokens", value=f"{tuple(data.shape)} {data.dtype}",
            limit="one-hot [batch, tokens, vocabulary], or ids [batch, tokens]", remedy="use TokenizedDataSet",
        )  # fmt: skip
    rows = []
    for row in data.tolist():
        while row and row[-1] == pad_token_id:
            row.pop()
        rows.append(row)
    return rows, data.shape[1]


def _read_cache(path: Path) -> dict[str, list[int]]:
    """Ids by key of a JSON lines file that was written here, or by LangVAE under keys of its own."""
    known: dict[str, list[int]] = {}
    if not path.exists():
        return known
    again = "delete that file, or name another as cache_persistence"
    with open_file(path) as file:
        for number, line in decoded_lines(file, path):
            place = f"line {number} of {path} is no entry of a cache of tokens"
            entry = parse_json(line, place, remedy=again)
            key, value = (entry.get("key"), entry.get("value")) if isinstance(entry, dict) else (None, None)
            made = parse_json(value, place, remedy=again) if isinstance(value, str) else None
            ids = made.get("input_ids") if isinstance(made, dict) else None
            if not isinstance(key, str) or not isinstance(ids, list) or not all(type(token) is int for token in ids):
                raise DataError(place, value=line[:80], limit="a key, and a value with input_ids", remedy=again)
            known[key] = ids
    return known


def _append_cache(path: Path, made: Mapping[str, list[int]]) -> None:
    with output_errors(path), replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        if path.exists():
            file.write(read_text(path, most="inflated"))
        for key, ids in made.items():
            value = json.dumps({"input_ids": ids, "attention_mask": [1] * len(ids)})
            file.write(json.dumps({"key": key, "value": value}) + "\n")
