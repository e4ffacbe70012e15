"""Weights of a frozen decoder in a layout of their own, for decoding on a CPU.

A decode step multiplies few rows by every weight, and torch's plain matrix product brings a weight into the layout it
computes with anew at each call. Here that is done once per decoder: in fp32 for our own product of few rows, in bf16, and
for many rows, for oneDNN's. The modules and their code stay Hugging Face's, only what a linear module calls is exchanged
while a step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmvae_fast.kernels.backend import current, extension
from lmvae_fast.kernels.packed_linear import pack_weight, packed_linear
from lmvae_fast.models.decoders import Decoder

FP32_ROWS = 2  # a single row waits for the weight's bytes, whatever their layout
OUR_ROWS = 48  # ahead of oneDNN's packed product at 32, not at 64 (docs/kernels/packed_linear.md)

Linear = nn.Linear | Conv1D
Forward = Callable[[Tensor], Tensor]
_packed: WeakKeyDictionary[Decoder, tuple[tuple, list[tuple[nn.Module, Forward]]]] = WeakKeyDictionary()


def pays(decoder: Decoder, rows: int) -> bool:
    """Whether packed weights make a step over this many rows faster (measured: docs/generation.md)."""
    if decoder.trains or decoder.device.type != "cpu" or current() == "reference" or torch.is_autocast_enabled("cpu"):
        return False
    if decoder.dtype == torch.float32 and FP32_ROWS <= rows <= OUR_ROWS and extension()[0]:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if decoder.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return decoder.dtype == torch.float32 and rows > OUR_ROWS


@contextmanager
def packed_weights(decoder: Decoder, rows: int, wanted: bool = True) -> Iterator[None]:
    """Inside, the decoder's linear maps read packed weights where that is wanted and pays; outside, nothing is changed."""
    exchanged = _forwards(decoder, rows) if wanted and pays(decoder, rows) else []
    for module, forward in exchanged:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, _ in exchanged:
            module.__dict__.pop("forward", None)


def _forwards(decoder: Decoder, rows: int) -> list[tuple[nn.Module, Forward]]:
    linear = [m for m in decoder.model.modules() if isinstance(m, Linear) and type(m) in (nn.Linear, Conv1D)]
    modules = [m for m in linear if m.weight.dtype == decoder.dtype]
    ours = decoder.dtype == torch.float32 and rows <= OUR_ROWS
    state = (ours, *((m.weight.data_ptr(), m.weight._version) for m in modules))
    if decoder not in _packed or _packed[decoder][0] != state:
        make = _our_forward if ours else partial(_onednn_forward, rows=rows)
        _packed[decoder] = (state, [(module, make(module)) for module in modules])
    return _packed[decoder][1]


def _weight(module: Linear) -> Tensor:
    """As ``[outputs, inputs]``."""
    weight = module.weight.detach()
    return weight.t() if type(module) is Conv1D else weight


def _our_forward(module: Linear) -> Forward:
    outputs, packed, bias = _weight(module).shape[0], pack_weight(_weight(module)), module.bias
    return lambda x: packed_linear(x, packed, bias, out_features=outputs)


def _onednn_forward(module: Linear, rows: int) -> Forward:
    # The number of rows is a hint: the layout serves any other as well.
    blocked = torch.ops.mkldnn._reorder_linear_weight(_weight(module).contiguous(), rows)
    bias, linear = module.bias, torch.ops.mkldnn._linear_pointwise
    return lambda x: linear(x, blocked, bias, "none", [], "")
