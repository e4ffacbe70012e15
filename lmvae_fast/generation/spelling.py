"""Decoded ids as text: a sentence with its prompt, a response alone, and a response to be put behind its prompt again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lmvae_fast.models.lmvae import LMVAE

_TAIL = 4  # ids of a prompt that say how what follows is spelled: a space, or the rest of a character


def spelled(model: LMVAE, sentences: Sequence[tuple[tuple[int, ...], list[int]]]) -> list[str]:
    """Text of each sentence, given as the prompt's ids and its own. A response ends where a special token, that which ends a
    turn of a dialogue, says so."""
    tokenizer = model.decoder.tokenizer
    if model.config.prompted:
        special = set(tokenizer.tokenizer.all_special_ids)
        answers = [list(itertools.takewhile(lambda token: token not in special, ids)) for _, ids in sentences]
        return [text.strip() for text in tokenizer.decode(answers)]
    return [text.strip() for text in tokenizer.decode([*prompt, *ids] for prompt, ids in sentences)]


def responses(model: LMVAE, sentences: Sequence[tuple[tuple[int, ...], list[int], int | None]]) -> list[str | None]:
    """What each response adds to the text of its prompt, its outer spaces, and the stop token that ended it where that is not
    the end token, included; given as what was read before it, its ids, and the token that ended it. None for models of
    sentences."""
    if not model.config.prompted:
        return [None] * len(sentences)
    tokenizer = model.decoder.tokenizer
    tails = [list(read[-_TAIL:]) for read, _, _ in sentences]
    stops = [[] if end in (None, tokenizer.eos_token_id) else [end] for _, _, end in sentences]
    before = tokenizer.decode(tails, keep_special=True)
    both = zip(tails, sentences, stops, strict=True)
    whole = tokenizer.decode(([*tail, *ids, *stop] for tail, (_, ids, _), stop in both), keep_special=True)
    return [text[len(begin) :] if text.startswith(begin) else text for begin, text in zip(before, whole, strict=True)]
