"""Prompts and responses as the CVAE's public code lays them out: one prompt, N responses, two kinds of padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lmvae_fast.errors import DataError, TokenizerError

IGNORED = -100


class PromptAndResponse(Protocol):
    """Anything with a prompt and a response."""

    @property
    def prompt(self) -> str:
        """What is answered."""

    @property
    def response(self) -> str:
        """The answer."""


class CVAEBatch(NamedTuple):
    """N responses of one prompt, all tensors int64 [N, S].

    encoder_ids, encoder_mask: padded left; prompt, response, exactly one end-of-text; mask 1 on what is not padding.
    input_ids, attention_mask, labels: padded right; the mask is 1 up to and with the first end-of-text, labels are -100
    on the prompt and the padding. The shift by one happens in the loss.
    """

    encoder_ids: Tensor
    encoder_mask: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> CVAEBatch:
        """The same on another device."""
        return CVAEBatch(*(tensor.to(device) for tensor in self))


def collate(
    items: Sequence[PromptAndResponse],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt: int,
    max_response: int,
) -> CVAEBatch:
    """N responses of one prompt as a batch. A long prompt loses its left end, a long response its right end.

    A response ends in one end-of-text, which the longest one lacks where it, tokenised by itself (with begin-of-text, if
    the tokenizer writes one), fills the limit. Padding is end-of-text.

    Raises:
        DataError: no items, several prompts, an empty prompt or response.
        TokenizerError: no end-of-text.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise TokenizerError("the tokenizer has no end-of-text token", remedy="set tokenizer.eos_token")
    prompts = {item.prompt for item in items}
    if len(prompts) != 1:
        raise DataError("a batch holds the responses of one prompt", value=f"{len(prompts)} prompts", limit=1)
    if any(not item.response for item in items):
        raise DataError("a response is empty", remedy="leave it out")
    prompt_ids = tokenizer(prompts.pop())["input_ids"]
    if not prompt_ids:
        raise DataError("a prompt has no tokens", remedy="give every response a prompt")
    rows = [tokenizer(item.prompt + item.response)["input_ids"][: len(prompt_ids) + max_response] for item in items]
    cut = max(0, len(prompt_ids) - max_prompt)
    rows, prompt = [row[cut:] for row in rows], len(prompt_ids) - cut
    alone = max(len(tokenizer(item.response)["input_ids"][:max_response]) for item in items)
    width = max(map(len, rows)) + (alone < max_response)
    ended = [[*row, end] if len(row) < width else row for row in rows]

    labels = [[IGNORED] * prompt + row[prompt:] + [IGNORED] * (width - len(row)) for row in ended]
    return CVAEBatch(
        encoder_ids=torch.tensor([[end] * (width - len(row)) + row for row in ended]),
        encoder_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ended]),
        input_ids=torch.tensor([row + [end] * (width - len(row)) for row in ended]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ended]),
        labels=torch.tensor(labels),
    )


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids of prompts, padded left, and their mask, both int64 [N, S]."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
