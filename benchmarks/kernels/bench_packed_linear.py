"""packed_linear against torch's products of a few rows with weights that are not in the cache: fp32, bf16, and int8 weights.

Every round goes through enough weights to leave none of them in a cache, as a decoding step does with a model's.
"""

from __future__ import annotations

import torch

from benchmarks.kernels.harness import Case
from lmvae_fast.kernels.packed_linear import (
    QuantizedWeight,
    pack_weight,
    packed_linear,
    packed_linear_int8,
    quantize_weight,
)
from lmvae_fast.models.decoder.large_pages import LargePages

DEVICES = ("cpu",)  # cuBLAS's work on CUDA
MATRICES = 24


def _case(rows: int, inputs: int, outputs: int, device: str, floor: float | None, dtype: torch.dtype) -> Case:
    weights = [torch.randn(inputs, outputs, device=device).to(dtype) for _ in range(MATRICES)]  # as GPT-2 holds them
    pages = LargePages()  # as decoding keeps them
    packed = [pages.copy(pack_weight(weight.t())) for weight in weights]
    x = torch.randn(rows, inputs, device=device).to(dtype)
    onednn = [torch.ops.mkldnn._reorder_linear_weight(w.t().contiguous(), rows) for w in weights]

    def ours() -> list[torch.Tensor]:
        return [packed_linear(x, weight, out_features=outputs) for weight in packed]

    def plain() -> list[torch.Tensor]:
        return [x @ weight for weight in weights]

    def packed_by_onednn() -> None:
        for weight in onednn:
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    def check() -> None:
        for mine, theirs in zip(ours(), plain(), strict=True):
            size = 1e-3 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(mine, theirs, rtol=size, atol=size * inputs**0.5)

    return Case(
        name=f"{MATRICES} weights of {inputs} x {outputs}, {rows} rows, {str(dtype).removeprefix('torch.')}",
        ours=ours, baseline=plain, baseline_name="torch.mm", others={"oneDNN, packed": packed_by_onednn}, floor=floor,
        bytes=dtype.itemsize * MATRICES * (inputs * outputs + rows * (inputs + outputs)),
        flops=2 * MATRICES * rows * inputs * outputs, dtype=dtype, check=check,
    )  # fmt: skip


def _int8_case(rows: int, inputs: int, outputs: int, floor: float | None) -> Case:
    """bf16 rows times int8 weights, against the same rows times bf16 weights of ours."""
    weights = [torch.randn(outputs, inputs).bfloat16() for _ in range(MATRICES)]
    pages, narrow = LargePages(), []
    for weight in weights:
        q = quantize_weight(weight)
        narrow.append(QuantizedWeight(*(pages.copy(part) for part in (q.values, q.scales, q.totals))))
    packed = [pages.copy(pack_weight(weight)) for weight in weights]
    x = torch.randn(rows, inputs).bfloat16()
    return Case(
        name=f"{MATRICES} weights of {inputs} x {outputs}, {rows} rows, int8 weights",
        ours=lambda: [packed_linear_int8(x, weight, out_features=outputs) for weight in narrow],
        baseline=lambda: [packed_linear(x, weight, out_features=outputs) for weight in packed],
        baseline_name="packed_linear in bf16", floor=floor,
        bytes=MATRICES * (inputs * outputs + 2 * rows * (inputs + outputs)),
        flops=2 * MATRICES * rows * inputs * outputs, dtype=torch.bfloat16,
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    whole = [
        _case(rows, 768, 3072, device, 1.0 if rows in (8, 32) else None, torch.float32)
        for rows in (1, 2, 8, 32, 48, 64, 256)
    ]
    half = [
        _case(rows, 768, 3072, device, 1.0 if rows in (8, 32) else None, torch.bfloat16)
        for rows in (1, 2, 8, 32, 64, 256)
    ]
    return [*whole, *half, *(_int8_case(rows, 768, 3072, 1.6 if rows == 1 else None) for rows in (1, 8, 32, 256))]
