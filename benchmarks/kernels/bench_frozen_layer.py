"""frozen_layer against torch's own norms and activations of a training batch's rows, forward and gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import gelu, layer_norm, silu

from benchmarks.kernels.harness import Case
from lmvae_fast.kernels import frozen_layer

ROWS = 512


def _case(name: str, ours: Callable, plain: Callable, numbers: int, floor: float | None, dtype: torch.dtype) -> Case:
    def check() -> None:
        size = 1e-4 if dtype == torch.float32 else 3e-2
        for mine, theirs in zip(ours(), plain(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=size, atol=size)

    return Case(
        name=f"{name}, {ROWS} rows, {str(dtype).removeprefix('torch.')}", ours=ours, baseline=plain,
        baseline_name="torch", floor=floor, bytes=dtype.itemsize * ROWS * numbers, flops=0, dtype=dtype, check=check,
    )  # fmt: skip


def _recorded(function: Callable, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    def run() -> list[torch.Tensor]:
        leaf = x.detach().requires_grad_()
        y = function(leaf)
        return [y.detach(), *torch.autograd.grad(y, leaf, grad)]

    return run


def cases(device: str) -> list[Case]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        x, grad = (torch.randn(ROWS, 768, device=device).to(dtype) for _ in range(2))
        weight, bias = (torch.randn(768, device=device).to(dtype) for _ in range(2))

        def norm(x: torch.Tensor = x, grad: torch.Tensor = grad, weight=weight, bias=bias) -> list[torch.Tensor]:
            y, stats = frozen_layer.norm(x, weight, bias, eps=1e-5)
            return [y, frozen_layer.norm_gradient(grad, x, stats, weight)]

        plain = _recorded(lambda x, weight=weight, bias=bias: layer_norm(x, (768,), weight, bias, 1e-5), x, grad)
        found.append(_case("LayerNorm of 768 and its gradient", norm, plain, 5 * 768, 1.0, dtype))
        for kind, width, floor in (("gelu_tanh", 3072, 1.0), ("swiglu", 2048, 1.0)):
            wide = torch.randn(ROWS, width * (2 if kind == "swiglu" else 1), device=device).to(dtype)
            into = torch.randn(ROWS, width, device=device).to(dtype)

            def ours(x=wide, grad=into, kind=kind) -> list[torch.Tensor]:
                return [frozen_layer.activation(x, kind), frozen_layer.activation_gradient(grad, x, kind)]

            function = _gated if kind == "swiglu" else _gelu
            numbers = (5 if kind == "gelu_tanh" else 8) * width
            found.append(
                _case(
                    f"{kind} of {width} and its gradient", ours, _recorded(function, wide, into), numbers, floor, dtype
                )
            )
    return found


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return gelu(x, approximate="tanh")


def _gated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=1)
    return silu(gate) * up
