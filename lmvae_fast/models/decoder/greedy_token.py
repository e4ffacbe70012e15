"""The most probable token without its logits, where a frozen head was prepared for that (kernels/greedy_head)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lmvae_fast.kernels.backend import choose, current, extension
from lmvae_fast.kernels.greedy_head import MOST_ROWS, GreedyHead, greedy_head, greedy_product, pack_head
from lmvae_fast.kernels.sample_token import sample_token
from lmvae_fast.models.decoder.large_pages import LargePages

# Of a row's absolute weights: hidden states would have to be as large for a logit to overflow. Above it logits are made.
_LARGEST_SUM = 2.0**62
_prepared: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], GreedyHead, float]] = WeakKeyDictionary()


@torch.no_grad()
def greedy_tokens(
    hidden: Tensor,
    head: nn.Module,
    logits: Callable[[Tensor], Tensor],
    *,
    only_a_product: bool,
    prepare: bool = True,
    at_once: int | None = None,
    finite: Tensor | None = None,
) -> Tensor:
    """The token of greatest logit after every hidden state ``[T, hidden]``: int64 ``[T]``.

    Args:
        hidden: final hidden states.
        head: the module with the head's weight.
        logits: from hidden states to logits, where they are made.
        only_a_product: whether the head is frozen and its logits are the product with its weight and nothing else.
        prepare: whether a bf16 copy of the head's weight may be made, which is kept while the head lives.
        at_once: tokens whose logits may exist at one time, where logits are made; all by default.
        finite: truth values ``[T]`` that become false where :func:`speaking` is.
    """
    if prepare and only_a_product and _pays(head, hidden):
        prepared, largest = _prepared_head(head)
        if largest < _LARGEST_SUM:
            if finite is not None:  # there are no logits to look at; below this none overflows
                finite &= hidden.abs().amax(-1) * largest < torch.finfo(hidden.dtype).max / 4
            return greedy_head(hidden, prepared)
    if only_a_product and _unwritten(head, hidden):
        found, largest_logit = greedy_product(hidden, cast(Tensor, head.weight))
        if finite is not None:  # NaN counts as the greatest: the chosen logit says what `speaking` says of the row
            finite &= torch.isfinite(largest_logit)
        return found
    chunks = hidden.split(at_once) if at_once is not None and len(hidden) > at_once else (hidden,)
    tokens = []
    for chunk, noted in zip(
        chunks, (None,) * len(chunks) if finite is None else finite.split(len(chunks[0])), strict=True
    ):
        made = logits(chunk)
        chosen = sample_token(made, greedy=True)  # torch's argmax of bf16 is slow on a CPU
        if noted is not None:  # NaN counts as the greatest: the chosen logit says what `speaking` says of the row
            noted &= torch.isfinite(made.gather(-1, chosen[:, None]).squeeze(-1))
        tokens.append(chosen)
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens)


def speaking(logits: Tensor) -> Tensor:
    """Whether each row of logits ``[..., vocabulary]`` has a greatest one: false where one is NaN or +inf, and where all are
    -inf, which some may be (tokens that are never said)."""
    return torch.isfinite(logits.amax(-1))


def _pays(head: nn.Module, hidden: Tensor) -> bool:
    """In fp32 on a CPU, and nothing but a matrix: on other devices and in bf16 the plain product is at its limit."""
    return (
        hidden.device.type == "cpu"
        and hidden.dtype == torch.float32
        and type(head) is nn.Linear
        and head.bias is None
        and type(head.weight) in (Tensor, nn.Parameter)  # not a quantiser's
        and head.weight.dtype == torch.float32
        and current() in ("auto", "cpp")
        and extension()[0]
        and not torch.is_autocast_enabled("cpu")
    )


def _unwritten(head: nn.Module, hidden: Tensor) -> bool:
    """On a GPU, a few rows: the head's weight is read once, and logits are compared where they are made."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(head.weight) in (Tensor, nn.Parameter)
        and head.weight.dtype == hidden.dtype
        and 0 < len(hidden) <= MOST_ROWS.get(hidden.dtype, 0)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(hidden.device.type)
        # the interpreter, which runs Triton's kernels on a CPU, is for tests
        and current() in (("auto", "triton") if hidden.device.type == "cuda" else ("triton",))
        and choose("greedy_product", hidden) == "triton"
    )


def _prepared_head(module: nn.Module) -> tuple[GreedyHead, float]:
    """The head, and the greatest sum of a row's absolute weights: no logit is above that times the greatest hidden state."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    state = (weight.data_ptr(), weight._version)
    if module not in _prepared or _prepared[module][0] != state:
        head = pack_head(weight)
        largest = float(torch.linalg.vector_norm(weight.detach(), 1, dim=1).amax())
        _prepared[module] = (state, replace(head, panels=LargePages().copy(head.panels)), largest)
    return _prepared[module][1:]
