"""Weights of a frozen decoder in oneDNN's own layout, for decoding on a CPU.

A decode step multiplies few rows by every weight, and torch's plain matrix product brings a weight into the layout of the
matrix units anew at each call. Here that is done once per decoder; the modules and their code stay Hugging Face's, only
what a linear module calls is exchanged while a step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmvae_fast.kernels.backend import current
from lmvae_fast.models.decoders import Decoder

FP32_ROWS = 8  # with fewer, a product in fp32 waits for the weight's bytes, whatever their layout

Linear = nn.Linear | Conv1D
Forward = Callable[[Tensor], Tensor]
_packed: WeakKeyDictionary[Decoder, tuple[tuple, list[tuple[nn.Module, Forward]]]] = WeakKeyDictionary()


def pays(decoder: Decoder, rows: int) -> bool:
    """Whether packed weights make a step over this many rows faster (measured: docs/generation.md)."""
    if decoder.trains or decoder.device.type != "cpu" or current() == "reference" or torch.is_autocast_enabled("cpu"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    if decoder.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return decoder.dtype == torch.float32 and rows >= FP32_ROWS


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
    state = tuple((m.weight.data_ptr(), m.weight._version) for m in modules)
    if decoder not in _packed or _packed[decoder][0] != state:
        _packed[decoder] = (state, [(module, _forward(module, rows)) for module in modules])
    return _packed[decoder][1]


def _forward(module: Linear, rows: int) -> Forward:
    weight = module.weight.detach()
    weight = weight.t().contiguous() if type(module) is Conv1D else weight.contiguous()
    # The number of rows is a hint: the layout serves any other as well.
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight, max(rows, 1))
    bias, linear = module.bias, torch.ops.mkldnn._linear_pointwise

    def forward(x: Tensor) -> Tensor:
        return linear(x, blocked, bias, "none", [], "")

    return forward
