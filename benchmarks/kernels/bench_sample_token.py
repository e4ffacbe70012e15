"""sample_token against what a decode loop writes in eager torch: softmax, sort, cumulative sum, multinomial."""

from __future__ import annotations

import torch

from benchmarks.kernels.harness import Case
from lmvae_fast.kernels.sample_token import sample_token


def _eager(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    scores = logits.float()
    if top_k:
        kth = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -float("inf"))
    if top_p < 1.0:
        ordered, order = scores.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        scores = torch.full_like(scores, -float("inf")).scatter(-1, order, ordered.masked_fill(beyond, -float("inf")))
    return torch.multinomial(scores.softmax(-1), 1).squeeze(-1)


def _case(
    name: str, batch: int, vocab: int, device: str, floor: float | None, dtype: torch.dtype = torch.float32,
    top_k: int = 0, top_p: float = 1.0, greedy: bool = False,
) -> Case:  # fmt: skip
    # four times a normal: about as peaked as a trained model's predictions
    logits = (4 * torch.randn(batch, vocab, device=device)).to(dtype)
    seed = torch.tensor([1, 2], device=device)

    def ours() -> None:
        sample_token(logits, greedy=greedy, top_k=top_k, top_p=top_p, seed=seed)

    def eager() -> None:
        if greedy:
            logits.argmax(-1)
        else:
            _eager(logits, top_k, top_p)

    return Case(
        name=f"{name} [{batch}, {vocab}] {str(dtype).removeprefix('torch.')}", ours=ours, baseline=eager,
        baseline_name="eager torch", floor=floor, bytes=batch * vocab * logits.element_size(),
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    return [
        _case("top-p 0.9", 32, 50_257, device, None, top_p=0.9),
        _case("top-p 0.9", 32, 50_257, device, None, dtype=torch.bfloat16, top_p=0.9),
        _case("top-k 50", 32, 50_257, device, None, top_k=50),
        _case("all tokens", 32, 50_257, device, None),
        _case("greedy", 32, 50_257, device, None, greedy=True),
        _case("top-p 0.9", 1, 128_256, device, None, top_p=0.9),
        _case("top-p 0.9", 256, 50_257, device, None, top_p=0.9),
    ]
