"""The most probable token without its logits, where a frozen head was packed for that (kernels/greedy_head)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lmvae_fast.kernels.backend import current, extension
from lmvae_fast.kernels.greedy_head import GreedyHead, greedy_head, pack_head
from lmvae_fast.kernels.sample_token import sample_token
from lmvae_fast.models.large_pages import LargePages

if TYPE_CHECKING:
    from lmvae_fast.models.decoders import Decoder

_packed: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], GreedyHead]] = WeakKeyDictionary()


@torch.no_grad()
def greedy_tokens(decoder: Decoder, hidden: Tensor, *, pack: bool = True, at_once: int | None = None) -> Tensor:
    """The token of greatest logit after every hidden state ``[T, hidden]``: int64 ``[T]``.

    pack: whether the head may be packed (a bf16 copy, kept while the decoder lives). at_once: tokens whose logits may
    exist at one time, where logits are made; all by default.
    """
    if pack and _pays(decoder, hidden):
        return greedy_head(hidden, _head(decoder))
    chunks = hidden.split(at_once) if at_once is not None and len(hidden) > at_once else (hidden,)
    said = [sample_token(decoder.logits(chunk), greedy=True) for chunk in chunks]  # torch's argmax of bf16 is slow on a CPU
    return said[0] if len(said) == 1 else torch.cat(said)


def _pays(decoder: Decoder, hidden: Tensor) -> bool:
    """Frozen, in fp32 on a CPU, and nothing but a matrix: on other devices and in bf16 the plain product is at its limit."""
    module = decoder.model.get_output_embeddings()
    return (
        not decoder.trains and hidden.device.type == "cpu" and hidden.dtype == torch.float32
        and type(module) is nn.Linear and module.bias is None and module.weight.dtype == torch.float32
        and decoder.softcap is None and current() in ("auto", "cpp") and extension()[0]
        and not torch.is_autocast_enabled("cpu")
    )  # fmt: skip


def _head(decoder: Decoder) -> GreedyHead:
    weight = decoder.model.get_output_embeddings().weight
    state = (weight.data_ptr(), weight._version)
    if decoder not in _packed or _packed[decoder][0] != state:
        head = pack_head(weight)
        elements = head.panels.numel()  # even: a float32's room holds two
        room = LargePages().empty(elements // 2).view(torch.bfloat16)
        _packed[decoder] = (state, replace(head, panels=room.view_as(head.panels).copy_(head.panels)))
    return _packed[decoder][1]
