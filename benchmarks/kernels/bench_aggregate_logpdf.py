"""aggregate_logpdf against eager logsumexp: M samples of the N posteriors of every prompt, as a step of DG-KL has them.

Two eager sides: all prompts in one broadcast, [prompts, M N, N, D], and prompt after prompt, as a training script with one
prompt per device writes it. Each has the floor; the case's name says which.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.kernels.harness import Case
from lmvae_fast.kernels.aggregate_logpdf import aggregate_logpdf

MIN_VAR = 1e-4


def _eager(z: Tensor, mu: Tensor, logvar: Tensor, per_dim: bool) -> Tensor:
    """z [..., K, D], mu and logvar [..., N, D] -> [..., K(, D)]."""
    distance = z.unsqueeze(-2) - mu.unsqueeze(-3)
    variance = 2.0 * logvar.exp() + MIN_VAR
    density = -0.5 * math.log(2.0 * math.pi) - 0.5 * logvar.unsqueeze(-3) - distance.square() / variance.unsqueeze(-3)
    if per_dim:
        return torch.logsumexp(density, -2) - math.log(mu.shape[-2])
    return torch.logsumexp(density.sum(-1), -1) - math.log(mu.shape[-2])


def _case(
    prompts: int, posteriors: int, samples: int, dim: int, device: str, per_dim: bool, floor: float | None,
    looped: bool = False, dtype: torch.dtype = torch.float32,
) -> Case:  # fmt: skip
    count = prompts * posteriors
    mu, logvar = torch.randn(count, dim, device=device), 0.3 * torch.randn(count, dim, device=device) - 1.0
    z = mu + torch.exp(0.5 * logvar) * torch.randn(samples, count, dim, device=device)
    leaves = [x.to(dtype).requires_grad_() for x in (z, mu, logvar)]
    cu = torch.arange(0, count + 1, posteriors, dtype=torch.int32, device=device)
    grad = torch.randn((samples, count, dim) if per_dim else (samples, count), device=device)

    def ours() -> tuple[Tensor, ...]:
        logq = aggregate_logpdf(*leaves, per_dim=per_dim, cu_posteriors=cu, min_var=MIN_VAR)
        return torch.autograd.grad(logq, leaves, grad)

    def split(x: Tensor) -> Tensor:
        """[M, prompts N, ...] -> [prompts, M N, ...]."""
        return x.unflatten(1, (prompts, posteriors)).transpose(0, 1).flatten(1, 2)

    def eager() -> tuple[Tensor, ...]:
        wide = [x.float() for x in leaves]
        parts = [split(wide[0]), *(x.unflatten(0, (prompts, posteriors)) for x in wide[1:])]
        if looped:
            logq = torch.stack([_eager(*part, per_dim) for part in zip(*parts, strict=True)])
        else:
            logq = _eager(*parts, per_dim)
        return torch.autograd.grad(logq, leaves, split(grad))

    def check() -> None:
        for a, b in zip(ours(), eager(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2 if dtype != torch.float32 else 1e-3, atol=1e-3)

    form = "per dimension" if per_dim else "joint"
    return Case(
        name=f"forward + backward {form}, N {posteriors}, M {samples}, D {dim}, {prompts} prompts "
        f"{str(dtype).removeprefix('torch.')}",
        ours=ours,
        baseline=eager,
        baseline_name="eager logsumexp, " + ("prompt by prompt" if looped else "all prompts at once"),
        floor=floor,
        # forward: z, mu, logvar in, logq out; backward: the same and the gradient in, three gradients out
        bytes=leaves[0].element_size() * (3 * z.numel() + 6 * mu.numel()) + 3 * 4 * grad.numel(),
        # a density: 4 forward, 10 backward, beside its exponentials
        flops=14 * samples * count * posteriors * dim,
        check=check,
    )


def cases(device: str) -> list[Case]:
    return [
        _case(16, 16, 16, 32, device, True, floor=5.0),
        _case(16, 16, 16, 32, device, True, floor=5.0, looped=True),
        _case(16, 16, 16, 32, device, False, floor=None),
        _case(16, 16, 16, 32, device, True, floor=None, dtype=torch.bfloat16),
        _case(1, 16, 16, 32, device, True, floor=None),
        _case(8, 32, 16, 32, device, True, floor=None),
        _case(1, 256, 1, 128, device, True, floor=None),
        _case(1, 256, 1, 128, device, False, floor=None),
    ]
