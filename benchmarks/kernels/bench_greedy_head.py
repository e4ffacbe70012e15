"""greedy_head against an fp32 product and its argmax, with weights that are not in the cache."""

from __future__ import annotations

import torch

from benchmarks.kernels.harness import Case
from lmvae_fast.kernels.greedy_head import greedy_head, pack_head
from lmvae_fast.kernels.packed_linear import pack_weight, packed_linear

DEVICES = ("cpu",)  # decoders run in bf16 on CUDA
HEADS = 3  # more than any cache holds, as by the next step a decoder's other weights have passed through it


def _case(rows: int, inputs: int, vocabulary: int, device: str, floor: float | None) -> Case:
    weights = [0.02 * torch.randn(vocabulary, inputs, device=device) for _ in range(HEADS)]
    heads = [pack_head(weight) for weight in weights]
    packed = [pack_weight(weight) for weight in weights] if rows <= 48 else []
    hidden = torch.randn(rows, inputs, device=device)

    def ours() -> list[torch.Tensor]:
        return [greedy_head(hidden, head) for head in heads]

    def plain() -> list[torch.Tensor]:
        return [(hidden @ weight.t()).argmax(-1) for weight in weights]

    def packed_fp32() -> list[torch.Tensor]:
        return [packed_linear(hidden, weight, out_features=vocabulary).argmax(-1) for weight in packed]

    def check() -> None:
        for mine, theirs, weight in zip(ours(), plain(), weights, strict=True):
            logits = hidden.double() @ weight.double().t()
            best = logits.amax(-1)
            for ids in (mine, theirs):  # both within fp32's rounding of the largest
                torch.testing.assert_close(logits.gather(1, ids[:, None]).squeeze(1), best, rtol=0, atol=1e-5)

    return Case(
        name=f"{HEADS} heads of {vocabulary} x {inputs}, {rows} rows, float32", ours=ours, baseline=plain,
        baseline_name="torch: product, argmax", others={"packed_linear, argmax": packed_fp32} if packed else {}, floor=floor,
        bytes=2 * HEADS * vocabulary * inputs, flops=2 * HEADS * rows * inputs * vocabulary, dtype=torch.bfloat16,
        check=check,
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    return [_case(rows, 768, 50257, device, 1.5 if rows in (1, 32) else None) for rows in (1, 32, 256)]
