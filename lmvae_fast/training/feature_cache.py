"""Tokenised sentences and what a frozen encoder says of them, computed once and kept on disk.

While the encoder is frozen its pooled output of a sentence never changes, so an epoch need not run it. Entries are
keyed by content (sentences, tokenizer, encoder weights, pooling), never by file names or dates: what changed is another
entry.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmvae_fast.documents import parse_json
from lmvae_fast.errors import OutputError
from lmvae_fast.files import fingerprint_tensors, replacing, sweep, write_tensors
from lmvae_fast.memory import free_disk
from lmvae_fast.models.inputs import most_of_prompt
from lmvae_fast.tensor_files import is_finite
from lmvae_fast.text.checks import refuse_table
from lmvae_fast.text.prompts import TokenizedPrompts, prompts_and_responses
from lmvae_fast.text.tokenizer import TokenizedSentences, text_and_labels, without_state


def content_key(**parts: Any) -> str:
    """sha256 of named JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class TensorCache:
    """A folder of safetensors files by content key.

    Entries are written atomically and carry the sha256 of their content; one that is damaged, truncated or another
    key's is recomputed with a warning. What is read is memory-mapped: pages come in as they are used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def path(self, kind: str, key: str) -> Path:
        return self.folder / f"{kind}-{key[:32]}.safetensors"

    def get(
        self, kind: str, key: str, compute: Callable[[], Mapping[str, Tensor]],
        check: Callable[[dict[str, Tensor]], None] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The tensors of `key`: read if they are there and whole, else computed and stored.

        check: raises ValueError for tensors that cannot be those of the key, whoever wrote them.

        A cache that cannot be written costs time, not correctness: it is reported by a warning, and the computed
        tensors are returned. So is one that would fill its disk, which nothing of it is written to.
        """
        sweep(self.folder)  # another key's too: what was killed then may never be asked for again
        path = self.path(kind, key)
        if path.is_file():
            try:
                found = self._read(path, key)
                if check is not None:
                    check(found)
                return found
            except (SafetensorError, OSError, ValueError) as error:
                warnings.warn(f"cache entry {path} is unusable and is computed again: {error}", stacklevel=2)
        tensors = dict(compute())
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        free = free_disk(path)
        if size > free:
            warnings.warn(
                f"{kind} are not cached and will be computed again next time: they take {size / 1e6:,.1f} MB, and "
                f"{free / 1e6:,.1f} MB are free for {self.folder}; set cache_dir to a folder of another disk", stacklevel=2,
            )  # fmt: skip
            return tensors
        metadata = {"key": key, "sha256": fingerprint_tensors(tensors)}
        try:
            with replacing(path) as temporary:
                write_tensors(temporary, tensors, metadata)
        except OutputError as error:
            warnings.warn(f"{kind} could not be cached and will be computed again next time: {error}", stacklevel=2)
            return tensors
        return self._read(path, key)

    @staticmethod
    def _read(path: Path, key: str) -> dict[str, Tensor]:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if metadata.get("key") != key:
            raise ValueError("it belongs to another key")
        if metadata.get("sha256") != fingerprint_tensors(tensors):
            raise ValueError("its content does not match its sha256")
        return tensors


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 of what a Hugging Face tokenizer does: its backend's serialisation, or a slow one's vocabulary."""
    backend = getattr(without_state(tokenizer), "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return content_key(kind=type(tokenizer).__name__, rules=rules, special=tokenizer.special_tokens_map)


def tokenized_sentences(model: Any, data: Any, cache: TensorCache, *, on_long: str) -> TokenizedSentences:
    """`model.tokenize(data, on_long=...)`, from the cache where the same sentences were tokenised so before."""
    if isinstance(data, TokenizedSentences):
        return data
    refuse_table(data)
    data = data if isinstance(data, Sequence) else list(data)  # read an iterator once
    if isinstance(data, str) or not data:
        return model.tokenize(data, on_long=on_long)  # raises, and says what is wrong with it
    prompted = bool(getattr(model.config, "prompted", False))
    kind = TokenizedPrompts if prompted else TokenizedSentences
    rows: Any = prompts_and_responses(data) if prompted else text_and_labels(data)
    most = most_of_prompt(model.config, model.decoder) if prompted else None
    own: dict[str, Any] = {}
    if prompted:
        joint = model.config.encoder_padding == "released"
        aggregated = getattr(model.config, "kl_mode", None) == "density_gap"  # of which the report counts
        own = {
            "max_prompt_len": most, "group_size": model.config.group_size, "parted": "joint" if joint else "by prompt",
            "aggregated": aggregated,
        }  # fmt: skip
    reader = getattr(getattr(model, "encoder", None), "tokenizer", None)
    key = content_key(
        **own,
        rows=hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        special="text",  # how special tokens are read that a text spells
        tokenizer=tokenizer_fingerprint(model.decoder.tokenizer.tokenizer),
        encoder=None if reader is None else tokenizer_fingerprint(reader),  # the report counts what it does not know
        vocabulary=model.decoder.vocab_size,
        max_len=model.config.max_len,
        annotations=model.config.annotations,
        on_long=on_long,
        fields=[field.name for field in dataclasses.fields(kind)],
    )
    longest = model.config.max_len + ((most or 1 << 40) if prompted else 0)
    width = len(model.config.annotations)

    def check(tensors: dict[str, Tensor]) -> None:
        _check_tokens(_from_tensors(dict(tensors), kind), model.decoder.vocab_size, longest, width)

    found = cache.get("tokens", key, lambda: _to_tensors(model.tokenize(data, on_long=on_long)), check)
    return _from_tensors(dict(found), kind)


def _to_tensors(sentences: TokenizedSentences) -> dict[str, Tensor]:
    """The tensors of the sentences as they are, all else as JSON in bytes."""
    values = {field.name: getattr(sentences, field.name) for field in dataclasses.fields(sentences)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    text = json.dumps({name: value for name, value in values.items() if name not in tensors})
    return tensors | {"json": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def _from_tensors(tensors: dict[str, Tensor], kind: type[TokenizedSentences]) -> TokenizedSentences:
    if "json" not in tensors or tensors["json"].dtype != torch.uint8:
        raise ValueError("it holds no tokens")
    text = tensors.pop("json").numpy().tobytes().decode("utf-8")
    try:
        return kind(**(parse_json(text, "its tokens") | tensors))
    except TypeError as error:
        raise ValueError(f"its fields are not those of {kind.__name__}") from error


def _check_tokens(found: TokenizedSentences, vocabulary: int, longest: int, labels: int) -> None:
    """Raises ValueError for sentences that no tokenizer of this vocabulary makes."""
    columns = (found.texts, found.spelled, found.ids, found.source_rows)
    if not all(isinstance(column, list) for column in columns) or len({len(column) for column in columns}) != 1:
        raise ValueError("its columns are of different lengths")
    for ids in found.ids:
        if not isinstance(ids, list) or not 0 < len(ids) <= longest or not all(type(i) is int for i in ids):
            raise ValueError(f"it holds a sentence of other than 1 to {longest} ids")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError(f"it holds ids outside a vocabulary of {vocabulary}")
    if not all(isinstance(text, str) for text in (*found.texts, *found.spelled)):
        raise ValueError("its texts are none")
    if found.annotations is not None:
        check_rows(
            {"annotations": found.annotations}, {"annotations": (len(found.ids), labels or found.annotations.shape[-1])}
        )


def encoder_fingerprint(model: Any) -> str | None:
    """sha256 of all that decides a sentence's pooled features; None when the encoder trains, so that nothing does."""
    if model.config.train_encoder:
        return None
    own = {"encoder": model.encoder.fingerprint(), "special": "text"}
    return content_key(**own, tokenizer=tokenizer_fingerprint(model.encoder.tokenizer))


def pooled_features(
    model: Any, sentences: TokenizedSentences, encoder: str | None, cache: TensorCache, *, batch_size: int
) -> Tensor | None:
    """Pooled encoder outputs [N, width] of tokenised sentences, cached or computed; None when the encoder trains.

    encoder: `encoder_fingerprint(model)`.
    """
    if encoder is None:
        return None
    key = content_key(sentences=sentences.fingerprint(), encoder=encoder)

    def compute() -> dict[str, Tensor]:
        return {"pooled": model.pool(sentences, batch_size=batch_size).cpu()}

    def check(tensors: dict[str, Tensor]) -> None:
        width = getattr(model.encoder, "width", None) or tensors["pooled"].shape[-1]
        check_rows(tensors, {"pooled": (len(sentences), width)})

    return cache.get("pooled", key, compute, check)["pooled"]


def check_rows(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless there are exactly these tensors, of these shapes, floating and finite."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != dict(shapes):
        raise ValueError(f"it holds {found}, not {dict(shapes)}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not is_finite(tensor):
            raise ValueError(f"{name} holds what are no finite numbers")
