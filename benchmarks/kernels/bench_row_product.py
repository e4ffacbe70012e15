"""row_product against torch's own norm, product, activation and sum, over weights that are not in the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import gelu, layer_norm, linear

from benchmarks.kernels.harness import Case
from lmvae_fast.kernels.row_product import Norm, row_product

DEVICES = ("cuda",)  # packed_linear is this on a CPU
LAYERS = 12


def _case(rows: int, device: str, dtype: torch.dtype) -> Case:
    """The four products of GPT-2 small's layers, each reading what the one before wrote; attention is left out."""

    def part(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.randn(outputs, inputs, device=device) / (2 * inputs) ** 0.5
        return weight.to(dtype), torch.randn(outputs, device=device).to(dtype)

    layers = [[part(2304, 768), part(768, 768), part(3072, 768), part(768, 3072)] for _ in range(LAYERS)]
    factor, shift = torch.ones(768, device=device, dtype=dtype), torch.zeros(768, device=device, dtype=dtype)
    norm, first = Norm(factor, shift, 1e-5, True), torch.randn(rows, 768, device=device).to(dtype)

    def ours() -> list[torch.Tensor]:
        x = first
        for qkv, out, up, down in layers:
            heard = row_product(x, *qkv, norm=norm, settled=True)[:, :768]
            x = row_product(heard, *out, added=x, settled=True)
            inner = row_product(x, *up, norm=norm, activation="gelu_tanh", settled=True)
            x = row_product(inner, *down, added=x, settled=True)
        return [x]

    def plain() -> list[torch.Tensor]:
        x = first
        for qkv, out, up, down in layers:
            heard = linear(layer_norm(x, (768,), factor, shift, 1e-5), *qkv)[:, :768]
            x = x + linear(heard, *out)
            inner = gelu(linear(layer_norm(x, (768,), factor, shift, 1e-5), *up), approximate="tanh")
            x = x + linear(inner, *down)
        return [x]

    def check() -> None:
        size = 1e-3 if dtype == torch.float32 else 5e-2
        for mine, theirs in zip(ours(), plain(), strict=True):
            assert ((mine - theirs).norm() / theirs.norm()).item() < size

    return Case(
        name=f"products of {LAYERS} layers of GPT-2 small, {rows} rows, {str(dtype).removeprefix('torch.')}", ours=ours,
        baseline=plain, baseline_name="torch", floor=None, bytes=dtype.itemsize * LAYERS * 12 * 768 * 768,
        flops=2 * rows * LAYERS * 12 * 768 * 768, dtype=dtype, check=check,
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    make: Callable[[int, torch.dtype], Case] = lambda rows, dtype: _case(rows, device, dtype)  # noqa: E731
    return [make(rows, torch.bfloat16) for rows in (1, 4, 16)] + [make(1, torch.float32)]
