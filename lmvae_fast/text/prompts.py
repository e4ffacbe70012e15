"""From prompts with responses to token ids, and to packed batches in which only responses are predicted.

A prompt and its response are tokenised as one text, as the public code of CVAE with G-Skip does it, and parted after as many
tokens as the prompt has by itself. Where the text of both does not begin with these tokens (a prompt that ends in a space,
which joins the response's first word), that would give the prompt a part of the response: there, both are tokenised by
themselves. A long prompt loses its left end (the begin-of-text with it), a long response its right.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch

from lmvae_fast.errors import DataError
from lmvae_fast.text.batch import IGNORED, Batch, pack
from lmvae_fast.text.checks import check_text
from lmvae_fast.text.tokenizer import SentenceTokenizer, TokenizedSentences

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedPrompts(TokenizedSentences):
    """Prompts with responses, ready for training. ``ids`` are those of a prompt and its response, ``texts`` the responses.

    Attributes:
        prompt_lengths: tokens of each prompt, the start of the row's ids.
        groups: what each response shares its aggregate with: an id per group of at most ``group_size`` responses of one
            prompt, counted from 0 in the order in which prompts come first; a prompt's groups have ids that follow one another.
        prompts: id of each response's prompt.
        group_size: the most responses of a group.
        report: counts, beside those of sentences: ``prompts_cut`` (responses whose prompt lost its left end), ``single``
            (groups of one response, whose aggregate is their posterior: a density gap is then the plain KL). Where there are
            any: ``apart``, those tokenised apart from their prompt, and ``special``, those whose prompt or response spells a
            special token that parts no dialogue.
    """

    prompt_lengths: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    group_size: int = 1

    @property
    def grouped(self) -> Sequence[int]:
        """Id of the group that each response must stay in one batch with."""
        return self.groups

    def fingerprint(self) -> str:
        """SHA-256 over everything a model sees of these sentences, in hexadecimal."""
        return hashlib.sha256(json.dumps([self.ids, self.prompt_lengths, self.groups]).encode()).hexdigest()


def are_prompts(examples: Sequence[Any]) -> TypeGuard[Sequence[Any]]:
    """Whether these are prompts with responses, by the first of them."""
    first = examples[0] if len(examples) else None
    return isinstance(getattr(first, "prompt", None), str) and isinstance(getattr(first, "response", None), str)


def prompts_and_responses(examples: Iterable[Any]) -> list[tuple[str, str]]:
    """Prompt and response of each example; a plain string is a response to an empty prompt. DataError for anything else."""
    rows: list[tuple[str, str]] = []
    for row, item in enumerate(examples):
        pair = ("", item) if isinstance(item, str) else (getattr(item, "prompt", None), getattr(item, "response", None))
        if not (isinstance(pair[0], str) and isinstance(pair[1], str)):
            raise DataError(
                f"row {row} is no prompt with a response", value=f"{type(item).__name__} {str(item)[:60]}",
                limit="a PromptResponse", remedy="PromptDataset.from_iterable takes pairs and mappings",
            )  # fmt: skip
        for name, text in (("prompt", pair[0]), ("response", pair[1])):
            check_text(text, f"the {name} of row {row}")
        rows.append((pair[0], pair[1]))
    return rows


def prompt_ids(prompts: Sequence[str], tokenizer: SentenceTokenizer, max_prompt_len: int | None) -> list[list[int]]:
    """What the decoder reads before a response: the prompt as the tokenizer writes it by itself, with its begin-of-text if
    it has one, cut at the left to ``max_prompt_len`` tokens; the start token where nothing is written."""
    if special := sum(tokenizer.spells_special(prompt, marks=False) for prompt in prompts):
        logger.warning("%d of %d prompts spell a special token, which is read as text", special, len(prompts))
    return [_last(ids, max_prompt_len) or [tokenizer.bos_token_id] for ids in tokenizer.encode_whole(prompts)]


def tokenize_prompts(
    examples: Iterable[Any],
    tokenizer: SentenceTokenizer,
    *,
    max_len: int,
    max_prompt_len: int | None,
    vocab_size: int,
    group_size: int,
    on_long: str = "truncate",
    on_empty: str = "drop",
    released: bool = False,
    aggregated: bool = False,
) -> TokenizedPrompts:
    """Tokenise prompts with responses.

    Args:
        examples: with ``prompt`` and ``response``.
        tokenizer: of the decoder.
        max_len: the most tokens kept of a response; max_prompt_len: of a prompt, None for all.
        vocab_size: rows of the decoder's embedding.
        group_size: the most responses of a prompt that share an aggregate. A prompt with more has several groups: of k
            groups, group s has the responses s, s + k, s + 2 k, ..
        on_long: ``truncate``, ``drop`` or raise an ``error`` on a response of more than max_len tokens. Prompts are cut.
        on_empty: ``drop`` or raise an ``error`` on a response without tokens.
        released: part every text by the number of the prompt's tokens, as the public code does.
        aggregated: a loss goes by the aggregates of groups, so it is said how many are of one response.

    Raises:
        DataError: nothing is left, an example is refused by the options, or a token id lies outside the embedding.
    """
    rows = prompts_and_responses(examples)
    if not rows:
        raise DataError("there are no responses", value=0, limit="at least one", remedy="check the data's source")
    distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in rows))}
    alone = tokenizer.encode_whole(list(distinct))
    both = tokenizer.encode_whole([prompt + response for prompt, response in rows])
    report = {"kept": 0, "truncated": 0, "dropped": 0, "empty": 0, "prompts_cut": 0, "single": 0}
    special = apart = 0
    ids: list[list[int]] = []
    lengths: list[int] = []
    places: list[int] = []
    kept: list[int] = []
    for row, ((prompt, response), whole) in enumerate(zip(rows, both, strict=True)):
        first = alone[distinct[prompt]]
        if not released and whole[: len(first)] != first:
            whole = first + tokenizer.encode_response(response)
            apart += 1
        answer = whole[len(first) :]
        if answer[-1:] == [tokenizer.eos_token_id]:  # a turn's end that is the end token, which a batch puts there
            answer, whole = answer[:-1], whole[:-1]
        if not response.strip() or not answer:
            if on_empty == "error":
                raise DataError(
                    f"response {row} is empty", value=repr(response), remedy="remove it, or set on_empty='drop'"
                )
            report["empty"] += 1
            continue
        if max(whole) >= vocab_size:
            raise DataError(
                f"row {row} has a token the decoder does not know", value=max(whole), limit=f"< {vocab_size}",
                remedy="use the decoder's own tokenizer",
            )  # fmt: skip
        if len(answer) > max_len:
            if on_long == "error":
                raise DataError(
                    f"response {row} is too long: {response[:60]!r}", value=f"{len(answer)} tokens", limit=max_len,
                    remedy="raise max_len, or choose on_long='truncate' or 'drop'",
                )  # fmt: skip
            if on_long == "drop":
                report["dropped"] += 1
                continue
            report["truncated"] += 1
            answer = answer[:max_len]
        given = _last(whole[: len(first)], max_prompt_len) or [tokenizer.bos_token_id]
        report["prompts_cut"] += max_prompt_len is not None and len(first) > max_prompt_len
        special += tokenizer.spells_special(prompt + response, marks=False)
        ids.append([*given, *answer])
        lengths.append(len(given))
        places.append(distinct[prompt])
        kept.append(row)
    report["kept"] = len(ids)
    report |= {name: count for name, count in (("apart", apart), ("special", special)) if count}
    if not ids:
        raise DataError("no response is left", value=report, remedy="raise max_len or choose on_long='truncate'")
    groups = group_ids(places, group_size)
    report["single"] = int((np.bincount(groups) == 1).sum()) if group_size > 1 or aggregated else 0
    if any(report[name] for name in ("truncated", "dropped", "empty", "prompts_cut")) or special or apart:
        logger.warning(
            "of %d responses: %s (max_len %d, max_prompt_len %s)", len(rows), report, max_len, max_prompt_len
        )
    if report["single"] and aggregated:
        logger.warning("%d groups are one response: there a density gap is the response's plain KL", report["single"])
    answers = tokenizer.decode(row[length:] for row, length in zip(ids, lengths, strict=True))
    return TokenizedPrompts(
        [text.strip() for text in answers], answers, ids, None, kept, report, lengths, groups, places, group_size
    )


def group_ids(prompts: Sequence[int], group_size: int) -> list[int]:
    """The group of each response, from its prompt's id: see :class:`TokenizedPrompts`."""
    rows: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    groups, first = [0] * len(prompts), 0
    for own in rows.values():
        slices = -(-len(own) // group_size)
        for place, row in enumerate(own):
            groups[row] = first + place % slices
        first += slices
    return groups


def make_prompt_batch(
    sentences: TokenizedPrompts,
    rows: Sequence[int] | np.ndarray | None = None,
    *,
    tokenizer: SentenceTokenizer,
    max_len: int,
    released: bool = False,
) -> Batch:
    """Pack some prompts with responses: the decoder reads all of a row but its last token and predicts the response; the
    encoder reads all of it.

    A response ends in the end token, as far as ``max_len`` reaches.

    Args:
        released: as the public code does it: the encoder's rows of one group are padded left with end tokens to one length,
            and the longest response of a group has no end token where it, with the begin-of-text that its tokenizer writes
            before it by itself, fills ``max_len``.
    """
    rows = list(range(len(sentences)) if rows is None else rows)
    end = tokenizer.eos_token_id
    groups = [sentences.groups[row] for row in rows]
    lengths = [sentences.prompt_lengths[row] for row in rows]
    whole = []
    for row, length in zip(rows, lengths, strict=True):
        answer = sentences.ids[row][length:]
        whole.append([*sentences.ids[row][:length], *[*answer, end][:max_len]])
    pads = [0] * len(rows)
    if released:
        whole = _without_longest_end(whole, lengths, groups, max_len, end, tokenizer.writes_bos)
        longest = _greatest(map(len, whole), groups)
        pads = [longest[group] - len(ids) for ids, group in zip(whole, groups, strict=True)]
    labels = [[IGNORED] * (length - 1) + ids[length:] for ids, length in zip(whole, lengths, strict=True)]
    packed = pack([ids[:-1] for ids in whole], labels)
    encoder_rows = [[end] * pad + ids for pad, ids in zip(pads, whole, strict=True)]
    encoder = pack(encoder_rows, encoder_rows)
    mask = None
    if any(pads):
        real = [[0] * pad + [1] * len(ids) for pad, ids in zip(pads, whole, strict=True)]
        mask = torch.tensor([bit for row in real for bit in row])
    return Batch(
        **packed,  # type: ignore[arg-type]
        tokens=torch.tensor([len(ids) - length for ids, length in zip(whole, lengths, strict=True)]),
        indices=torch.tensor([sentences.source_rows[row] for row in rows], dtype=torch.int64),
        encoder_ids=encoder["input_ids"],  # type: ignore[arg-type]
        encoder_mask=mask,
        encoder_cu_seqlens=encoder["cu_seqlens"],  # type: ignore[arg-type]
        encoder_max_seqlen=encoder["max_seqlen"],  # type: ignore[arg-type]
        targets=torch.tensor(
            [place for place, label in enumerate(_flat(labels)) if label != IGNORED], dtype=torch.int64
        ),
        groups=torch.tensor(groups, dtype=torch.int64),
        cu_groups=_offsets(groups),
        max_group=max(Counter(groups).values(), default=1),
        texts=[sentences.texts[row] for row in rows],
        prompt_ids=[tuple(ids[:length]) for ids, length in zip(whole, lengths, strict=True)],
    )


def _without_longest_end(
    whole: list[list[int]], lengths: list[int], groups: list[int], max_len: int, end: int, writes_bos: bool
) -> list[list[int]]:
    """Rows without the end token that the public code leaves out: that of a group's longest response, where it has
    ``max_len`` tokens with the begin-of-text."""
    alone = [len(ids) - length - (ids[-1] == end) + writes_bos for ids, length in zip(whole, lengths, strict=True)]
    longest = _greatest(alone, groups)
    return [
        ids[:-1] if ids[-1] == end and count == longest[group] >= max_len else ids
        for ids, count, group in zip(whole, alone, groups, strict=True)
    ]


def _greatest(values: Iterable[int], groups: Sequence[int]) -> dict[int, int]:
    """The greatest value in each group."""
    greatest: dict[int, int] = {}
    for value, group in zip(values, groups, strict=True):
        greatest[group] = max(value, greatest.get(group, value))
    return greatest


def _offsets(groups: Sequence[int]) -> torch.Tensor | None:
    """Where each group begins, int32 ``[groups + 1]``; None unless the rows of every group stand side by side."""
    starts = [place for place, group in enumerate(groups) if place == 0 or groups[place - 1] != group]
    if len(starts) != len(set(groups)):
        return None
    return torch.tensor([*starts, len(groups)], dtype=torch.int32)


def _last(ids: Sequence[int], count: int | None) -> list[int]:
    return list(ids if count is None else ids[len(ids) - min(len(ids), count) :])


def _flat(rows: Iterable[Iterable[int]]) -> list[int]:
    return [value for row in rows for value in row]
