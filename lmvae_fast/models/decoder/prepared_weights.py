"""A frozen decoder's layers as decoding runs them: over weights in a layout of their own on a CPU, fused on a GPU.

On a GPU the layers of known families are those that training goes through (training_layers.py): fewer kernels than the
modules', over the weights where they are; steps of a few rows have fewer still (row_layers.py).

On a CPU a decode step multiplies few rows by every weight, and torch's plain matrix product brings a weight into the layout it
computes with anew at each call. Here that is done once per decoder: for our own products, and for more rows than they are
fastest for (kernels/packed_linear/choices.py) for oneDNN's. Where our product is used and the family is known, a whole body is
exchanged (prepared_layers.py); otherwise the modules and their code stay Hugging Face's, and only what a linear module calls is
exchanged while a step runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lmvae_fast.errors import ConfigError
from lmvae_fast.kernels.backend import FLOATS, choose, current
from lmvae_fast.kernels.packed_linear import most_rows
from lmvae_fast.models.decoder.decoder import WHEN_MOVED, Decoder
from lmvae_fast.models.decoder.exchange import Exchanges, Forward, exchanged
from lmvae_fast.models.decoder.large_pages import LargePages
from lmvae_fast.models.decoder.linear_weights import Linear, linear_weight, plain_linears
from lmvae_fast.models.decoder.low_rank import adapter_state, adapter_weights, same_values
from lmvae_fast.models.decoder.packed_products import Packing
from lmvae_fast.models.decoder.prepared_layers import body_forward, examined
from lmvae_fast.models.decoder.row_layers import RowLayers
from lmvae_fast.models.decoder.training_layers import written_out

OURS = (torch.float32, torch.bfloat16)  # dtypes that packed_linear has a kernel for


class _Prepared(NamedTuple):
    """What a step exchanges, and what it was made from: adapters by their values."""

    state: tuple
    adapters: list[Tensor]
    made: Exchanges


_packed: WeakKeyDictionary[Decoder, _Prepared] = WeakKeyDictionary()
WHEN_MOVED.append(lambda decoder: _packed.pop(decoder, None))


def pays(decoder: Decoder, rows: int) -> bool:
    """Whether prepared layers make a step over this many rows faster (measured on CPUs: docs/generation.md).

    Adapters are added to the copies, which is for decoders that are not being trained: otherwise they are others at every step.
    """
    at_rest = not decoder.trains or (decoder.adapts and not decoder.training)
    if not at_rest or current() == "reference" or torch.is_autocast_enabled(decoder.device.type):
        return False
    if fused_layers(decoder):
        return True
    if decoder.device.type != "cpu":
        return False
    if _ours(decoder, rows):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if decoder.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (
        decoder.dtype == torch.float32 and rows > 1
    )  # a single row waits for the weight's bytes, whatever their layout


def check_weights(decoder: Decoder, weights: str | None) -> None:
    """Raises ConfigError where a decoder cannot be decoded with these weights: None for its own, or "int8"."""
    if weights is None:
        return
    reasons = {
        "its decoder trains": decoder.trains,
        f"its decoder is on {decoder.device}": decoder.device.type != "cpu",
        f"its decoder is held in {decoder.dtype}": decoder.dtype not in OURS,
        "its decoder is quantised already": bool(getattr(decoder.model, "is_quantized", False)),
        "autocast is on": torch.is_autocast_enabled("cpu"),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(
                f"weights={weights!r} decodes a frozen decoder in float32 or bfloat16 on a CPU",
                value=reason,
                remedy="leave weights out",
            )


def _ours(decoder: Decoder, rows: int) -> bool:
    return decoder.dtype in OURS and rows <= most_rows(decoder.dtype)


def fused_layers(decoder: Decoder) -> bool:
    """Whether this device runs the layers that training has, where a family's are written out."""
    # The interpreter, which runs Triton's kernels on a CPU, is for tests.
    on_cpu = decoder.device.type == "cpu" and current() != "triton"
    return (
        not on_cpu and decoder.dtype in FLOATS and choose("frozen_layer", next(decoder.body.parameters())) == "triton"
    )


@contextmanager
def packed_weights(decoder: Decoder, rows: int, wanted: bool = True, weights: str | None = None) -> Iterator[None]:
    """Inside, the decoder's linear maps read packed weights where that is wanted and pays; outside, nothing is changed."""
    with exchanged(exchanges(decoder, rows, wanted, weights)):
        yield


def exchanges(decoder: Decoder, rows: int, wanted: bool = True, weights: str | None = None) -> Exchanges:
    """What `packed_weights` exchanges; a step need not look at every weight again (`exchanged`).

    weights: "int8" for weights rounded to that, whatever pays. Raises ConfigError as `check_weights`.
    """
    if weights is not None:
        check_weights(decoder, weights)
        return _forwards(decoder, rows, weights)
    return _forwards(decoder, rows) if wanted and pays(decoder, rows) else []


def _forwards(decoder: Decoder, rows: int, weights: str | None = None) -> Exchanges:
    dtype = decoder.dtype  # looked up once: this is asked for at every step
    linears = plain_linears(decoder.model)
    modules = [m for m in linears if m.weight.dtype == dtype]
    ours = "fused" if weights is None and fused_layers(decoder) else weights is not None or _ours(decoder, rows)
    copied = [tensor for m in linears for tensor in (m.weight, m.bias) if tensor is not None]
    copied += [weight for weight in decoder.body.parameters() if weight.dim() == 1]  # of norms: Gemma's are copied
    state = (ours, weights, adapter_state(decoder.body), *((tensor.data_ptr(), tensor._version) for tensor in copied))
    # Those are looked at themselves: a fused optimizer's step leaves no trace in a tensor's version.
    adapters = adapter_weights(decoder.body)
    found = _packed.get(decoder)
    if found is None or found.state != state or not same_values(adapters, found.adapters):
        # Before the next copy of the weights is made; kept recordings hold copies with the adapters of their time.
        for let_go in WHEN_MOVED if adapters else (lambda decoder: _packed.pop(decoder, None),):
            let_go(decoder)
        if ours == "fused":
            forward = fused_forward(decoder)
            made: Exchanges = [] if forward is None else [(decoder.body, forward)]
        else:
            made = _by_our_products(decoder, modules, weights) if ours else _onednn(modules, rows)
        found = _packed[decoder] = _Prepared(state, [weight.clone() for weight in adapters], made)
    return found.made


def fused_forward(decoder: Decoder) -> Forward | None:
    """The body's layers of few kernels, or None where they are not written out."""
    return examined(decoder, lambda: written_out(decoder, LargePages(), RowLayers), None)


def _by_our_products(decoder: Decoder, modules: list[Linear], weights: str | None) -> Exchanges:
    packing = Packing(weights)
    body = body_forward(decoder, packing)
    if body is None:
        return [(module, _when_called(module, packing)) for module in modules]
    inside = set(decoder.body.modules())
    return [(decoder.body, body), *((m, _when_called(m, packing)) for m in modules if m not in inside)]


def _when_called(module: Linear, packing: Packing) -> Forward:
    # Greedy decoding in fp32 has another way with the head (greedy_token.py): what is not called takes no memory.
    packed = cache(partial(packing.linear, module))
    return lambda x: packed().checked(x)


def _onednn(modules: list[Linear], rows: int) -> Exchanges:
    return [(module, _onednn_forward(module, rows)) for module in modules]


def _onednn_forward(module: Linear, rows: int) -> Forward:
    # The number of rows is a hint: the layout serves any other as well.
    blocked = torch.ops.mkldnn._reorder_linear_weight(linear_weight(module).contiguous(), rows)
    bias, linear = module.bias, torch.ops.mkldnn._linear_pointwise
    return lambda x: linear(x, blocked, bias, "none", [], "")
