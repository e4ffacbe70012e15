"""packed_linear against torch's products of a few rows with weights that are not in the cache.

Every round goes through enough weights to leave none of them in a cache, as a decoding step does with a model's.
"""

from __future__ import annotations

import torch

from benchmarks.kernels.harness import Case
from lmvae_fast.kernels.packed_linear import pack_weight, packed_linear
from lmvae_fast.models.decoder.large_pages import LargePages

DEVICES = ("cpu",)  # cuBLAS's work on CUDA
MATRICES = 24


def _case(rows: int, inputs: int, outputs: int, device: str, floor: float | None) -> Case:
    weights = [torch.randn(inputs, outputs, device=device) for _ in range(MATRICES)]  # as GPT-2 holds them
    pages = LargePages()  # as decoding keeps them
    packed = [pages.empty(*p.shape).copy_(p) for p in (pack_weight(weight.t()) for weight in weights)]
    x = torch.randn(rows, inputs, device=device)
    onednn = (
        [torch.ops.mkldnn._reorder_linear_weight(w.t().contiguous(), rows) for w in weights] if device == "cpu" else []
    )

    def ours() -> list[torch.Tensor]:
        return [packed_linear(x, weight, out_features=outputs) for weight in packed]

    def plain() -> list[torch.Tensor]:
        return [x @ weight for weight in weights]

    def packed_by_onednn() -> None:
        for weight in onednn:
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    def check() -> None:
        for mine, theirs in zip(ours(), plain(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)

    return Case(
        name=f"{MATRICES} weights of {inputs} x {outputs}, {rows} rows, float32", ours=ours, baseline=plain,
        baseline_name="torch.mm", others={"oneDNN, packed": packed_by_onednn} if onednn else {}, floor=floor,
        bytes=4 * MATRICES * (inputs * outputs + rows * (inputs + outputs)), flops=2 * MATRICES * rows * inputs * outputs,
        check=check,
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    return [_case(rows, 768, 3072, device, 1.0 if rows in (8, 32) else None) for rows in (1, 2, 8, 32, 48, 64, 256)]
