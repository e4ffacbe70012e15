"""lm_head_loss against what models do: F.linear to full logits, then F.cross_entropy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.harness import Case
from lmvae_fast.kernels.backend import backend
from lmvae_fast.kernels.lm_head_loss import lm_head_loss

SENTENCES = 32


def _operands(tokens: int, width: int, vocab: int, device: str, dtype: torch.dtype, trained: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(device, dtype).requires_grad_(trained)
    labels = torch.randint(0, vocab, (tokens,), generator=generator).to(device)
    return [hidden, weight, labels, torch.full((tokens,), 1.0 / SENTENCES, device=device)]


def _step(function, operands: list[Tensor]) -> tuple[Tensor, ...]:
    loss = function(*operands)
    return loss.detach(), *torch.autograd.grad(loss, [x for x in operands[:2] if x.requires_grad])


def _ours(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    return lm_head_loss(hidden, weight, labels, token_weights=token_weights)[0]


def _full_logits(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    nll = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")
    return (nll * token_weights).sum()


def _liger() -> Callable[..., Tensor] | None:
    """Liger's fused loss, where it is installed; it has one weight for all tokens, which is what these cases use."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, labels, _: loss(weight, hidden, labels) / SENTENCES


def _case(
    tokens: int,
    width: int,
    vocab: int,
    device: str,
    floor: float | None,
    dtype: torch.dtype = torch.float32,
    baseline_dtype: torch.dtype | None = None,
    trained: bool = False,
    chunked: bool = False,
) -> Case:
    mine = _operands(tokens, width, vocab, device, dtype, trained)
    theirs = _operands(tokens, width, vocab, device, baseline_dtype or dtype, trained)

    def check() -> None:
        tolerance = dict(rtol=2e-2, atol=2e-2) if dtype != torch.float32 else dict(rtol=1e-3, atol=1e-4)
        for a, b in zip(_step(_ours, mine), _step(_full_logits, theirs), strict=True):
            torch.testing.assert_close(a.float(), b.float(), **tolerance)

    def plain_chunks() -> None:
        with backend("reference"):
            _step(_ours, mine)

    others = {"chunks in plain torch": plain_chunks} if chunked else {}
    liger = _liger() if device == "cuda" and baseline_dtype in (None, dtype) else None
    if liger is not None:
        others["Liger"] = lambda: _step(liger, theirs)
    short = str(dtype).removeprefix("torch.")
    against = str(baseline_dtype or dtype).removeprefix("torch.")
    head = "trained" if trained else "frozen"
    return Case(
        name=f"forward + backward, {head} head, {tokens} tokens, {width}, {vocab}, {short}",
        ours=lambda: _step(_ours, mine),
        baseline=lambda: _step(_full_logits, theirs),
        baseline_name=f"linear + cross_entropy in {against}",
        others=others,
        floor=floor,
        # the products that no method avoids: logits, d hidden, and d weight where the head is trained
        flops=(3 if trained else 2) * 2 * tokens * width * vocab,
        bytes=mine[1].element_size() * vocab * width * (2 if trained else 1),
        dtype=dtype,
        check=check,
    )


def cases(device: str) -> list[Case]:
    gpt2 = (400, 768, 50257)
    half = torch.bfloat16
    rows = [
        _case(*gpt2, device, floor=1.5, chunked=True),
        _case(*gpt2, device, floor=3.0, dtype=half, baseline_dtype=torch.float32),
        _case(*gpt2, device, floor=None, dtype=half),
        _case(*gpt2, device, floor=None, trained=True),
    ]
    if device == "cuda":
        rows += [
            _case(8192, 768, 50257, device, floor=None, dtype=half),
            _case(8192, 2048, 128256, device, floor=None, dtype=half),
            _case(4096, 2048, 151936, device, floor=None, dtype=half, trained=True),
        ]
    else:
        rows += [_case(100, 512, 128256, device, floor=None), _case(100, 512, 151936, device, floor=None, dtype=half)]
    return rows
