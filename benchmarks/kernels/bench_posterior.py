"""posterior_sample against what a training script writes in eager torch (fresh noise on both sides)."""

from __future__ import annotations

import torch

from benchmarks.kernels.harness import Case
from lmvae_fast.kernels.posterior import posterior_sample


def _case(batch: int, dim: int, device: str, floor: float | None, dtype: torch.dtype = torch.float32) -> Case:
    mu, logvar = (torch.randn(batch, dim, device=device).to(dtype).requires_grad_() for _ in range(2))
    dz = torch.randn(batch, dim, device=device).to(dtype)
    dkl = torch.ones(batch, device=device)

    def ours() -> None:
        z, kl = posterior_sample(mu, logvar, seed=None)
        torch.autograd.grad((z, kl), (mu, logvar), (dz, dkl))

    def eager() -> None:
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        kl = 0.5 * (mu.pow(2) + logvar.exp() - logvar - 1).sum(-1)
        torch.autograd.grad((z, kl), (mu, logvar), (dz, dkl.to(kl.dtype)))

    width = mu.element_size()
    return Case(
        name=f"forward + backward [{batch}, {dim}] {str(dtype).removeprefix('torch.')}",
        ours=ours,
        baseline=eager,
        baseline_name="eager torch",
        floor=floor,
        # forward: mu, logvar in, z out; backward: mu, logvar, dz in, two gradients out; kl and dkl once each way
        bytes=8 * batch * dim * width + 3 * 4 * batch,
    )


def cases(device: str) -> list[Case]:
    return [
        _case(512, 128, device, floor=3.0),
        _case(64, 128, device, floor=None),
        _case(4096, 768, device, floor=None),
        _case(512, 128, device, floor=None, dtype=torch.bfloat16),
    ]
