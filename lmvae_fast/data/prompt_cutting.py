"""Texts cut into a prompt and its response by tokens: the first few, and the rest.

As the public code of CVAE with G-Skip does it (zhangjf-nlp/LLM-based-CVAE): both halves are texts again, which the model
tokenises anew, so a text is kept only where that gives the same tokens back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from lmvae_fast.data.dataset import DataReport
from lmvae_fast.data.prompt_readers import LabelledText
from lmvae_fast.data.prompts import PromptDataset, PromptResponse
from lmvae_fast.errors import DataError

_MOST_CUT = 4  # tokens that may be missing at the end of a text that survives


class TextTokenizer(Protocol):
    """What is asked of a Hugging Face tokenizer."""

    all_special_ids: list[int]

    def __call__(self, text: str) -> Any: ...

    def decode(self, token_ids: Sequence[int], **options: Any) -> str: ...


def cut_texts(
    texts: Iterable[str | LabelledText], tokenizer: TextTokenizer, *, prompt_tokens: int, response_tokens: int
) -> PromptDataset:
    """Prompt and response from every text that is long enough.

    Args:
        texts: with or without labels.
        tokenizer: of the decoder; its begin-of-text, where it writes one, is one of the prompt's tokens.
        prompt_tokens: length of every prompt.
        response_tokens: the most tokens of a response; what follows them is lost. A text of fewer than ``prompt_tokens +
            response_tokens // 10`` tokens is dropped; so is one that cannot be read back from its tokens, even without up
            to 4 at its end.

    Returns:
        The dataset; ``.report`` counts what was dropped, and why.

    Raises:
        DataError: lengths below 1, or nothing left.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("response_tokens", response_tokens)):
        if not isinstance(value, int) or value < 1:
            raise DataError(f"{name} is out of range", value=value, limit="an integer >= 1")
    report = DataReport("texts", "cut by tokens")
    special = set(tokenizer.all_special_ids)
    written = sum(token in special for token in tokenizer("a")["input_ids"])
    kept: list[PromptResponse] = []
    for row, item in enumerate(texts):
        text, label = (item, None) if isinstance(item, str) else item
        report.read += 1
        ids = tokenizer(text)["input_ids"][: prompt_tokens + response_tokens]
        if len(ids) < max(prompt_tokens + response_tokens // 10, prompt_tokens + 1):
            report.drop("too short", f"row {row}")
            continue
        if sum(token in special for token in ids) > written:  # of which a text that is read back would be without
            report.drop("spells a special token", f"row {row}")
            continue
        prompt = _readable(ids[:prompt_tokens], tokenizer, special)
        whole = _readable(ids, tokenizer, special)
        if prompt is None or whole is None or not whole.startswith(prompt) or not whole[len(prompt) :].strip():
            report.drop("cannot be read back from its tokens", f"row {row}")
            continue
        kept.append(PromptResponse(prompt, whole[len(prompt) :], label))
    report.kept = len(kept)
    if not kept:
        raise DataError("no text is long enough", value=str(report), remedy="use longer texts, or lower the lengths")
    return PromptDataset(kept, report)


def _readable(ids: Sequence[int], tokenizer: TextTokenizer, special: set[int]) -> str | None:
    """The text of the longest beginning of ``ids`` that is tokenised to itself, with at most 4 tokens less; else None."""
    for cut in range(_MOST_CUT + 1):
        part = list(ids[: len(ids) - cut])
        words = [token for token in part if token not in special]
        if not words:
            return None
        text = tokenizer.decode(words, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if [token for token in tokenizer(text)["input_ids"] if token not in special] == words:
            return text
    return None
