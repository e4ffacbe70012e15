"""Weights of a frozen decoder in a layout of their own, for decoding on a CPU.

A decode step multiplies few rows by every weight, and torch's plain matrix product brings a weight into the layout it
computes with anew at each call. Here that is done once per decoder: in fp32 for our own product of few rows, in bf16, and
for many rows, for oneDNN's. Where our product is used and the family is known, a whole body is exchanged (bodies.py);
otherwise the modules and their code stay Hugging Face's, and only what a linear module calls is exchanged while a step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmvae_fast.kernels.backend import current
from lmvae_fast.kernels.packed_linear import most_rows, packed_linear
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.decoder.large_pages import LargePages
from lmvae_fast.models.decoder.prepared_layers import body_forward, linear_weight, packed_of

Linear = nn.Linear | Conv1D
Forward = Callable[..., Any]
Exchanges = list[tuple[nn.Module, Forward]]
_packed: WeakKeyDictionary[Decoder, tuple[tuple, Exchanges]] = WeakKeyDictionary()


def pays(decoder: Decoder, rows: int) -> bool:
    """Whether packed weights make a step over this many rows faster (measured: docs/generation.md)."""
    if decoder.trains or decoder.device.type != "cpu" or current() == "reference" or torch.is_autocast_enabled("cpu"):
        return False
    if decoder.dtype == torch.float32 and rows <= most_rows():
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if decoder.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (
        decoder.dtype == torch.float32 and rows > 1
    )  # a single row waits for the weight's bytes, whatever their layout


@contextmanager
def packed_weights(decoder: Decoder, rows: int, wanted: bool = True) -> Iterator[None]:
    """Inside, the decoder's linear maps read packed weights where that is wanted and pays; outside, nothing is changed."""
    with exchanged(exchanges(decoder, rows, wanted)):
        yield


def exchanges(decoder: Decoder, rows: int, wanted: bool = True) -> Exchanges:
    """What `packed_weights` exchanges; a step need not look at every weight again (`exchanged`)."""
    return _forwards(decoder, rows) if wanted and pays(decoder, rows) else []


@contextmanager
def exchanged(forwards: Exchanges) -> Iterator[None]:
    """Inside, these modules call these functions."""
    for module, forward in forwards:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, _ in forwards:
            module.__dict__.pop("forward", None)


def _forwards(decoder: Decoder, rows: int) -> Exchanges:
    dtype = decoder.dtype  # looked up once: this is asked for at every step
    linear = [m for m in decoder.model.modules() if isinstance(m, Linear) and type(m) in (nn.Linear, Conv1D)]
    modules = [m for m in linear if m.weight.dtype == dtype]
    ours = dtype == torch.float32 and rows <= most_rows()
    copied = [tensor for m in modules for tensor in (m.weight, m.bias) if tensor is not None]
    state = (ours, *((tensor.data_ptr(), tensor._version) for tensor in copied))
    if decoder not in _packed or _packed[decoder][0] != state:
        _packed.pop(decoder, None)  # before the next copy of the weights is made
        _packed[decoder] = (state, _ours(decoder, modules) if ours else _onednn(modules, rows))
    return _packed[decoder][1]


def _ours(decoder: Decoder, modules: list[Linear]) -> Exchanges:
    pages = LargePages()
    body = body_forward(decoder, pages)
    if body is None:
        return [(module, _when_called(module, pages)) for module in modules]
    inside = set(decoder.body.modules())
    return [(decoder.body, body), *((m, _when_called(m, pages)) for m in modules if m not in inside)]


def _when_called(module: Linear, pages: LargePages) -> Forward:
    # Greedy decoding has another way with the head (head.py): what is not called takes no memory.
    packed = cache(partial(packed_of, pages, module))

    def forward(x: Tensor) -> Tensor:
        linear = packed()
        return packed_linear(x, linear.packed, linear.bias, out_features=linear.out_features)

    return forward


def _onednn(modules: list[Linear], rows: int) -> Exchanges:
    return [(module, _onednn_forward(module, rows)) for module in modules]


def _onednn_forward(module: Linear, rows: int) -> Forward:
    # The number of rows is a hint: the layout serves any other as well.
    blocked = torch.ops.mkldnn._reorder_linear_weight(linear_weight(module).contiguous(), rows)
    bias, linear = module.bias, torch.ops.mkldnn._linear_pointwise
    return lambda x: linear(x, blocked, bias, "none", [], "")
