"""From sentences to token ids and back, with every loss counted."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lmvae_fast.errors import DataError, TokenizerError
from lmvae_fast.pretrained import load_pretrained
from lmvae_fast.text.checks import check_size, check_text, refuse_table
from lmvae_fast.text.special_tokens import SpecialTokens

logger = logging.getLogger(__name__)

#: Share of unknown tokens in a data set from which there is a warning.
MOST_UNKNOWN = 0.03


class TextReader(Protocol):
    """What an encoder is asked of the sentences that it will read."""

    def spells_special(self, text: str) -> bool: ...

    def unknown_tokens(self, texts: Sequence[str]) -> tuple[int, int]: ...


class SentenceTokenizer:
    """A decoder's tokenizer, with its start, end and padding tokens settled.

    Args:
        tokenizer: the Hugging Face tokenizer.
        bos_token_id, eos_token_id, pad_token_id: fall-backs from the model's configuration.
        start_token: the token that sentences begin with, as the vocabulary spells it; None for the tokenizer's own.

    Attributes:
        starts_with_end: whether sentences begin with the end token, for want of another.

    Raises:
        TokenizerError: there is no token to end a sentence with, or no ``start_token`` in the vocabulary.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        start_token: str | None = None,
    ):
        self.tokenizer, self.start_token = tokenizer, start_token
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else eos_token_id
        if not isinstance(eos, (int, type(None))):
            eos = eos[0] if len(eos) else None
        if eos is None:
            raise TokenizerError(
                "the decoder's tokenizer has no end-of-sentence token, so no sentence would ever end",
                value=type(tokenizer).__name__,
                remedy="set tokenizer.eos_token before building the decoder",
            )
        self.eos_token_id: int = eos
        # LangVAE's choice: sentences begin with bos, or with eos where a tokenizer (Qwen, say) has no bos.
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else bos_token_id
        first = first if start_token is None else _id_of(tokenizer, start_token)
        self.bos_token_id: int = eos if first is None else first
        self.starts_with_end = first is None
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else pad_token_id
        self.pad_token_id: int = eos if pad is None else pad
        self.unknown_id: int | None = None if tokenizer.unk_token_id == eos else tokenizer.unk_token_id
        self._texts, self._dialogues = SpecialTokens(tokenizer), SpecialTokens(tokenizer, marks=True)
        # Of a word, as of nothing a lone begin-of-text may be the end token too.
        self._writes_end = tokenizer("a")["input_ids"][-1:] == [eos]

    @classmethod
    def load(
        cls, name: str, config: Any, *, add_prefix_space: bool = True, start_token: str | None = None
    ) -> SentenceTokenizer:
        """Load a decoder's tokenizer; ``config`` is the model's, for special tokens the tokenizer does not name."""
        tokenizer = load_pretrained(AutoTokenizer, name, "decoder tokenizer", add_prefix_space=add_prefix_space)
        # transformers 5 drops the option for tokenizers that are a plain tokenizer.json; 4 set it on the pre-tokenizer.
        pre_tokenizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
        if add_prefix_space and pre_tokenizer is not None and hasattr(pre_tokenizer, "add_prefix_space"):
            pre_tokenizer.add_prefix_space = True
        if add_prefix_space and not _round_trips(tokenizer):
            # Some (Qwen's) then put a space before every piece: "It's 3.5 km" would become "It 's  3 . 5 km".
            plain = load_pretrained(AutoTokenizer, name, "decoder tokenizer")
            tokenizer = plain if _round_trips(plain) else tokenizer
        config = config.get_text_config(decoder=True)
        tokens = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return cls(tokenizer, start_token=start_token, **tokens)

    def check_ids(self, vocab_size: int) -> None:
        """Raises TokenizerError when a special token lies outside an embedding of ``vocab_size`` rows, or when the tokenizer is
        none for it.

        Other ids are checked sentence by sentence: a tokenizer may well have added tokens that its data never uses.
        """
        check_size(self.tokenizer, vocab_size, "decoder")
        highest = max(self.bos_token_id, self.eos_token_id)
        if highest >= vocab_size:
            raise TokenizerError(
                "the tokenizer's start or end token is not in the decoder's embedding",
                value=highest,
                limit=f"< {vocab_size}",
                remedy="use the decoder's own tokenizer, or resize_token_embeddings",
            )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without start and end tokens.

        A special token that is spelled in a text ("<|endoftext|>", Penn Treebank's "<unk>") is text like any other.
        """
        return self._texts.encode(texts, add_special_tokens=False)

    def spells_special(self, text: str, *, marks: bool = True) -> bool:
        """Whether a text spells a special token; without ``marks``: one that is not a dialogue's own (:meth:`encode_whole`)."""
        return (self._texts if marks else self._dialogues).spelled(text)

    def cut(self, sentence: list[int], limit: int) -> list[int]:
        """The first ``limit`` ids or a few fewer, so that none is a part of a character."""
        kept = sentence[:limit]
        for shorter in range(limit, max(limit - 4, 0), -1):  # UTF-8 has at most four bytes to a character
            if not self.decode([sentence[:shorter]])[0].endswith("\N{REPLACEMENT CHARACTER}"):
                return sentence[:shorter]
        return kept

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as the tokenizer writes them by itself, with a begin-of-text if it has one, without an end
        token that it puts last.

        Marks that part a dialogue ("<|eot_id|>") are tokens, any other special token that is spelled in a text is text.
        """
        rows = self._dialogues.encode(texts, add_special_tokens=True)
        return [ids[:-1] if self._writes_end and ids[-1:] == [self.eos_token_id] else ids for ids in rows]

    def encode_response(self, text: str) -> list[int]:
        """Token ids of a text that goes on from another, without start and end tokens; marks as in :meth:`encode_whole`."""
        return self._dialogues.encode([text], add_special_tokens=False)[0]

    @property
    def writes_bos(self) -> bool:
        """Whether the tokenizer puts a begin-of-text before a text by itself."""
        return bool(self.tokenizer("")["input_ids"]) and self.tokenizer("")["input_ids"][0] == self.bos_token_id

    def decode(self, ids: Iterable[Sequence[int]], *, keep_special: bool = False) -> list[str]:
        """Text of each sequence of ids, special tokens skipped unless they are to be kept, spaces as the tokenizer makes
        them."""
        return self.tokenizer.batch_decode(
            [list(row) for row in ids], skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False
        )


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Id of a token by its spelling in the vocabulary; TokenizerError where there is none."""
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        raise TokenizerError(
            "the start token is none of the decoder's vocabulary", value=repr(token),
            limit=f"{', '.join(map(str, tokenizer.all_special_tokens))}, or another of its {len(vocabulary)} tokens",
            remedy="spell it as the vocabulary does, or leave start_token unset",
        )  # fmt: skip
    return vocabulary[token]


def without_state(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer without the padding and truncation of its last call, which it would carry into files and fingerprints."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
    return tokenizer


def _round_trips(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether an ordinary sentence is what its ids spell, outer spaces aside."""
    text = "It's 3.5 km"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip() == text


@dataclass(frozen=True)
class TokenizedSentences(Sequence):
    """Sentences ready for training: ids without start and end tokens, and what was dropped on the way.

    Attributes:
        texts: the sentences as their ids spell them, without outer spaces.
        spelled: the same with outer spaces: what the encoder reads. Encoder and decoder thus see one text, truncation
            and prefix space included, as in LangVAE.
        ids: token ids, one list per sentence, none empty.
        annotations: pooled label features, float32 ``[N, labels]``, or None.
        source_rows: row of each sentence in the data it came from.
        report: counts of sentences: ``kept``, ``truncated``, ``dropped`` (too long), ``empty``; and, where there are any,
            ``without_end`` (as long as max_len, so that no end token is predicted), ``special`` (they spell a special token,
            which is read as text), ``unknown_tokens`` and, of the encoder, ``encoder_unknown_tokens``.
    """

    texts: list[str]
    spelled: list[str]
    ids: list[list[int]]
    annotations: Tensor | None
    source_rows: list[int]
    report: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row):
        return self.texts[row]

    @property
    def lengths(self) -> list[int]:
        """Token count of each sentence, end token not included."""
        return [len(ids) for ids in self.ids]

    @property
    def grouped(self) -> Sequence[int] | None:
        """Id of the group that each sentence must stay in one batch with, or None where each is for itself."""
        return None

    def fingerprint(self) -> str:
        """SHA-256 over everything a model sees of these sentences, in hexadecimal."""
        digest = hashlib.sha256(json.dumps([self.spelled, self.ids]).encode())
        if self.annotations is not None:
            digest.update(self.annotations.numpy().tobytes())
        return digest.hexdigest()


def tokenize(
    examples: Iterable[Any],
    tokenizer: SentenceTokenizer,
    *,
    max_len: int,
    vocab_size: int,
    encoder: TextReader | None = None,
    labels: Sequence[str] = (),
    on_long: str = "truncate",
    on_empty: str = "drop",
) -> TokenizedSentences:
    """Tokenise sentences (strings, or objects with ``text`` and ``labels``).

    Args:
        examples: the sentences.
        tokenizer: of the decoder.
        max_len: the most tokens kept of a sentence.
        vocab_size: rows of the decoder's embedding.
        encoder: what reads the sentences besides, where its own losses are to be counted.
        labels: the per-word labels that condition the model, in the order of their features; empty for none.
        on_long: ``truncate``, ``drop`` or raise an ``error`` on a sentence of more than max_len tokens.
        on_empty: ``drop`` or raise an ``error`` on a sentence without tokens.

    Raises:
        DataError: nothing is left, a sentence is refused by the two options, a label is unknown or missing, or a token
            id lies outside the embedding.
    """
    rows = text_and_labels(examples)
    if not rows:
        raise DataError("there are no sentences", value=0, limit="at least one", remedy="check the data's source")
    encoded = tokenizer.encode([text for text, _ in rows])
    ids, kept, features = [], [], []
    report = {"kept": 0, "truncated": 0, "dropped": 0, "empty": 0}
    noticed = {"without_end": 0, "special": 0, "unknown_tokens": 0, "encoder_unknown_tokens": 0}
    for row, ((text, words), sentence) in enumerate(zip(rows, encoded, strict=True)):
        if not text.strip() or not sentence:
            if on_empty == "error":
                raise DataError(
                    f"sentence {row} is empty", value=repr(text), remedy="remove it, or set on_empty='drop'"
                )
            report["empty"] += 1
            continue
        if max(sentence) >= vocab_size:
            raise DataError(
                f"sentence {row} has a token the decoder does not know",
                value=max(sentence),
                limit=f"< {vocab_size}",
                remedy="use the decoder's own tokenizer",
            )
        if len(sentence) > max_len:
            if on_long == "error":
                raise DataError(
                    f"sentence {row} is too long: {text[:60]!r}",
                    value=f"{len(sentence)} tokens",
                    limit=max_len,
                    remedy="raise max_len, or choose on_long='truncate' or 'drop'",
                )
            if on_long == "drop":
                report["dropped"] += 1
                continue
            report["truncated"] += 1
            sentence = tokenizer.cut(sentence, max_len)
        elif len(sentence) == max_len:
            noticed["without_end"] += 1
        noticed["special"] += tokenizer.spells_special(text) or (encoder is not None and encoder.spells_special(text))
        if tokenizer.unknown_id is not None:
            noticed["unknown_tokens"] += sentence.count(tokenizer.unknown_id)
        if labels:
            features.append(label_features(words, labels, max_len, row))
        ids.append(sentence)
        kept.append(row)
    spelled = tokenizer.decode(ids)
    encoder_tokens = 0
    if encoder is not None:
        noticed["encoder_unknown_tokens"], encoder_tokens = encoder.unknown_tokens(spelled)
    report["kept"] = len(ids)
    report |= {name: count for name, count in noticed.items() if count}
    if not ids:
        raise DataError("no sentence is left", value=report, remedy="raise max_len or choose on_long='truncate'")
    if any(count for name, count in report.items() if name != "kept"):
        logger.warning("of %d sentences: %s (max_len %d)", len(rows), report, max_len)
    of_parts = {
        "decoder": (noticed["unknown_tokens"], sum(map(len, ids))),
        "encoder": (noticed["encoder_unknown_tokens"], encoder_tokens),
    }
    for part, (unknown, tokens) in of_parts.items():
        if unknown > MOST_UNKNOWN * tokens:
            logger.warning(
                "%.0f%% of all tokens are unknown to the %s's tokenizer: the model will learn little of these sentences; "
                "take one whose tokenizer knows their words",
                100 * unknown / tokens,
                part,
            )
    texts = [text.strip() for text in spelled]
    return TokenizedSentences(texts, spelled, ids, torch.stack(features) if features else None, kept, report)


def text_and_labels(examples: Iterable[Any]) -> list[tuple[str, Sequence[str] | None]]:
    """Text and labels of each sentence, given as a string or as an object with ``text`` and ``labels``.

    Raises DataError for a row that is neither.
    """
    refuse_table(examples)
    rows: list[tuple[str, Sequence[str] | None]] = []
    for row, item in enumerate(examples):
        text = item if isinstance(item, str) else getattr(item, "text", None)
        if not isinstance(text, str):
            raise DataError(
                f"row {row} is no sentence",
                value=f"{type(item).__name__} {str(item)[:60]}",
                limit="a string, or an example with text and labels",
                remedy="SentenceDataset.from_iterable takes rows that are mappings with 'text'",
            )
        check_text(text, f"row {row}")
        rows.append((text, None if isinstance(item, str) else getattr(item, "labels", None)))
    return rows


def label_features(words: Sequence[str] | None, labels: Sequence[str], max_len: int, row: int = 0) -> Tensor:
    """One feature per label: the mean over max_len places of its occurrences, weighted by linspace(.1, 1, max_len).

    LangVAE's pooling of per-word annotations (its released encoder), with the places of the model's max_len instead of
    the batch's longest sentence, so that a sentence's features do not depend on its neighbours.
    """
    if words is None:
        raise DataError(
            f"sentence {row} has no labels",
            limit=f"one of {', '.join(labels)} per word",
            remedy="give annotated data, or configure the model without annotations",
        )
    index = {label: column for column, label in enumerate(labels)}
    weights = torch.linspace(0.1, 1.0, max_len) if max_len > 1 else torch.tensor([0.1])
    out = torch.zeros(len(labels))
    for place, label in enumerate(words[:max_len]):
        if label not in index:
            raise DataError(
                f"sentence {row} has an unknown label",
                value=repr(label),
                limit=", ".join(labels),
                remedy="add it to the configuration's annotations",
            )
        out[index[label]] += weights[place] / max_len
    return out
