"""Special tokens that a text spells ("</s>", "[MASK]", Penn Treebank's "<unk>") are text like any other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lmvae_fast.documents import parse_json
from lmvae_fast.errors import TokenizerError

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

#: What ends a turn in the chat formats of instruction-tuned decoders, some of which end a text in it as well.
TURN_MARKS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>")

# Put before a special token's name in the reader's vocabulary: a code point that is no character, so no text spells the name.
_HIDDEN = "\ufdd0"


class SpecialTokens:
    """Reads texts with a tokenizer, the special tokens that they spell as text.

    Args:
        tokenizer: the Hugging Face tokenizer.
        marks: whether the marks that part a dialogue stay tokens: chat formats' turn ends, and every special token that is
            none of the tokenizer's own start, end, padding, unknown, class, separator and mask.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, marks: bool = False):
        self.tokenizer = tokenizer
        roles = {str(token) for role in _ROLES if (token := getattr(tokenizer, role, None))}
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = {token for token in {*map(str, tokenizer.all_special_tokens), *added} if token}
        self.marks = special & {*TURN_MARKS, *(special - roles)} if marks else set()
        self.texts = special - self.marks
        self._spelled = _any_of(self.texts)
        self._reader: Tokenizer | None = None

    def spelled(self, text: str) -> bool:
        """Whether a text spells a special token that is read as text."""
        return self._spelled is not None and self._spelled.search(text) is not None

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool, longest: int | None = None) -> list[list[int]]:
        """Token ids of each text, cut to the ``longest``, with what the tokenizer itself puts around a text if asked for."""
        options: dict[str, Any] = {"add_special_tokens": add_special_tokens, "truncation": longest is not None}
        if longest is not None:
            options["max_length"] = longest
        if not self.marks:
            options["split_special_tokens"] = True
        rows: list[list[int]] = self.tokenizer(list(texts), **options)["input_ids"] if len(texts) else []
        spelling = [row for row, text in enumerate(texts) if self.spelled(text)]
        if spelling and getattr(self.tokenizer, "backend_tokenizer", None) is not None:
            # Not by split_special_tokens: it would take the marks apart, and a unigram's or a word list's vocabulary
            # (T5's) has "</s>" among its words and finds it in a text all the same.
            reader = self._read_as_text()
            reader.no_truncation()
            if longest is not None:
                reader.enable_truncation(longest, direction=self.tokenizer.truncation_side)
            found = reader.encode_batch([texts[row] for row in spelling], add_special_tokens=add_special_tokens)
            for row, encoding in zip(spelling, found, strict=True):
                rows[row] = encoding.ids
        return rows

    def _read_as_text(self) -> Tokenizer:
        """The tokenizer's backend with other names for the special tokens that are read as text; ids are as they were."""
        if self._reader is None:
            rules = parse_json(self.tokenizer.backend_tokenizer.to_str(), "the tokenizer", error=TokenizerError)
            model = rules["model"]
            for token in rules["added_tokens"]:
                token["content"] = self._hidden(token["content"])
            vocabulary = model["vocab"]
            if isinstance(vocabulary, dict):
                model["vocab"] = {self._hidden(name): place for name, place in vocabulary.items()}
            else:
                model["vocab"] = [[self._hidden(name), score] for name, score in vocabulary]
            if model.get("unk_token") is not None:
                model["unk_token"] = self._hidden(model["unk_token"])
            reader = Tokenizer.from_str(json.dumps(rules))
            reader.no_padding()
            self._reader = reader
        return self._reader

    def _hidden(self, name: str) -> str:
        return _HIDDEN + name if name in self.texts else name


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    found = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found))) if found else None
