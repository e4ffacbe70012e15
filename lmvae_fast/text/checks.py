"""What is refused before it is read: tables for sentences, strings that are no text, a tokenizer that is not its model's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from lmvae_fast.errors import DataError, TokenizerError

#: A tokenizer of fewer tokens beside its special ones knows no words: transformers makes one where a folder holds none.
FEWEST = 100


def refuse_table(examples: Any) -> None:
    """Raises DataError for a path and what else has no sentences, and for a mapping, a DataFrame or a dataset of columns:
    iterated, it gives its keys, not its sentences."""
    if isinstance(examples, os.PathLike) or not isinstance(examples, Iterable):
        raise DataError(
            "sentences must come one by one, and this has none", value=f"{type(examples).__name__} {examples}",
            limit="an iterable of strings or examples", remedy="lf.read(path) or lf.read_prompts(path) reads a file",
        )  # fmt: skip
    if isinstance(examples, Mapping) or hasattr(examples, "columns") or hasattr(examples, "column_names"):
        raise DataError(
            "sentences must come one by one, and this is a table or a mapping",
            value=type(examples).__name__,
            limit="an iterable of strings or examples",
            remedy="lf.read(table, column='text') or lf.read_prompts(table) takes DataFrames, datasets and mappings of columns",
        )


def check_text(text: str, place: str) -> None:
    """Raises DataError for a string that no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} is no text: it holds half a character (a lone surrogate)",
            value=repr(text[:60]),
            remedy="mend it, for instance with text.encode('utf-8', 'ignore').decode()",
        ) from error


def check_size(tokenizer: PreTrainedTokenizerBase, vocab_size: int, part: str) -> None:
    """Raises TokenizerError for a tokenizer that has hardly any of the tokens that the embedding of ``part`` has rows for.

    From a folder without tokenizer files transformers makes one of nothing but special tokens, which knows no word.
    A T5's has a hundred of them.
    """
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    words = len(tokenizer.get_vocab().keys() - added)
    if 10 * words < vocab_size and words < FEWEST:
        raise TokenizerError(
            f"the {part}'s tokenizer is not that of its embedding",
            value=f"{words} tokens beside the special ones",
            limit=f"an embedding of {vocab_size} rows",
            remedy=f"save the tokenizer beside the {part} (tokenizer.save_pretrained(folder)), or point to its own folder",
        )
