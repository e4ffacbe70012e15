"""latent_kv at GPT-2-small's size against one bare matmul, and its AdamW against the three steps it replaces."""

from __future__ import annotations

import math

import torch

from benchmarks.kernels.harness import Case
from lmvae_fast.kernels.latent_kv import LatentKVAdamW, latent_kv

GPT2 = (12, 2, 12, 33, 64)  # L, (key, value), Hkv, M, D
NZ = 128


def _forward(device: str, batch: int, dtype: torch.dtype, floor: float | None, view: str = "whole") -> Case:
    layers, two, heads, slots, dim = GPT2
    weight = (torch.randn(*GPT2, NZ, device=device) / NZ**0.5).to(dtype)
    z = torch.randn(batch, NZ, device=device).to(dtype)
    rows = math.prod(GPT2)
    positions = slots if view == "whole" else 2 * slots
    cache = torch.empty(layers, two, batch, heads, positions, dim, dtype=dtype, device=device)
    out = cache if view == "whole" else cache[:, :, :, :, 0::2]
    product = torch.empty(batch, rows, dtype=dtype, device=device)
    flat = weight.view(rows, NZ)

    def ours() -> None:
        latent_kv(z, weight, out=out)

    def matmul() -> None:
        torch.mm(z, flat.t(), out=product)

    def check() -> None:
        ours(), matmul()
        want = product.view(batch, layers, two, heads, slots, dim).permute(1, 2, 0, 3, 4, 5)
        torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-4)

    return Case(
        name=f"forward into a{'' if view == 'whole' else 'n interleaved'} cache, batch {batch} {str(dtype)[6:]}",
        ours=ours, baseline=matmul, baseline_name="one bare torch.mm(out=)", floor=floor,
        bytes=(rows * (NZ + batch) + batch * NZ) * z.element_size(), flops=2 * rows * NZ * batch, dtype=dtype, check=check,
    )  # fmt: skip


def _backward(device: str, batch: int) -> Case:
    """dz, dW and db of one dense backward; both sides allocate dW."""
    rows = math.prod(GPT2)
    weight = (torch.randn(*GPT2, NZ, device=device) / NZ**0.5).requires_grad_()
    bias = torch.randn(GPT2, device=device).requires_grad_()
    z = torch.randn(batch, NZ, device=device).requires_grad_()
    memory = latent_kv(z, weight, bias)
    grad = torch.randn_like(memory)
    flat = torch.nn.functional.linear(z, weight.view(rows, NZ), bias.view(rows))
    flat_grad = grad.permute(2, 0, 1, 3, 4, 5).reshape(batch, rows)

    def ours() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(memory, (z, weight, bias), grad, retain_graph=True)

    def eager() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(flat, (z, weight, bias), flat_grad, retain_graph=True)

    def check() -> None:
        for mine, theirs in zip(ours(), eager(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)

    return Case(
        name=f"dense backward (dz, dW, db), batch {batch} float32", ours=ours, baseline=eager,
        baseline_name="backward of F.linear", bytes=4 * rows * (2 * NZ + batch), flops=4 * rows * NZ * batch, check=check,
    )  # fmt: skip


def _adamw(device: str, batch: int, floor: float | None) -> Case:
    """A step of the projector: memory, and from its gradient dz, db, dW, clipping, AdamW."""
    rows = math.prod(GPT2)
    start = torch.randn(*GPT2, NZ, device=device) / NZ**0.5
    z = torch.randn(batch, NZ, device=device).requires_grad_()
    grad = torch.randn(GPT2[0], 2, batch, *GPT2[2:], device=device)
    ours_weight, ours_bias = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start[..., 0].clone())
    optimizer = LatentKVAdamW(ours_weight, lr=1e-3)
    ours_rest = torch.optim.AdamW([ours_bias], lr=1e-3, fused=True)

    def ours() -> None:
        optimizer.project(z, ours_bias).backward(grad)
        total = (optimizer.norm_sq() + ours_bias.grad.square().sum()).sqrt()
        clip = torch.clamp(1.0 / (total + 1e-6), max=1.0)
        ours_bias.grad.mul_(clip)
        ours_rest.step()
        optimizer.step(clip=clip)
        z.grad = ours_bias.grad = None

    weight, bias = (
        torch.nn.Parameter(start.view(rows, NZ).clone()),
        torch.nn.Parameter(start[..., 0].reshape(rows).clone()),
    )
    theirs = torch.optim.AdamW([weight, bias], lr=1e-3, fused=True)
    other_z = z.detach().clone().requires_grad_()
    flat_grad = grad.permute(2, 0, 1, 3, 4, 5).reshape(batch, rows)

    def eager() -> None:
        torch.nn.functional.linear(other_z, weight, bias).backward(flat_grad)
        torch.nn.utils.clip_grad_norm_([weight, bias], 1.0)
        theirs.step()
        theirs.zero_grad()
        other_z.grad = None

    def check() -> None:
        ours(), eager()
        torch.testing.assert_close(ours_weight.view(rows, NZ), weight, rtol=1e-4, atol=1e-5)

    # the forward reads W and writes the memory, dz reads W, the norm reads G, the update reads G and reads and writes W and
    # both moments; backward reads G as well
    return Case(
        name=f"forward, and AdamW in the backward pass, batch {batch} float32", ours=ours, baseline=eager,
        baseline_name="forward + backward + clip_grad_norm_ + AdamW(fused=True)", floor=floor,
        bytes=4 * rows * (8 * NZ + 4 * batch), flops=2 * rows * batch * (3 * NZ + batch), check=check,
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    return [
        _forward(device, 32, torch.float32, floor=0.9),
        _forward(device, 32, torch.float32, floor=None, view="interleaved"),
        _forward(device, 32, torch.bfloat16, floor=None),
        _forward(device, 1, torch.float32, floor=None),
        _backward(device, 32),
        _adamw(device, 32, floor=1.5),
    ]
