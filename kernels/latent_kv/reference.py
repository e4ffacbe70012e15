"""latent_kv in plain torch: the truth that every backend is tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import philox


def places(seed: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The number of each of `batch` sentences in the batch that a mask is drawn for, and that batch's size; int64 [B], [].

    seed int64 [2]: they are that batch; int64 [5] = (seed, offset, first, step, total): they are every step-th of it.
    """
    index = torch.arange(batch, dtype=torch.int64, device=seed.device)
    return (index, torch.full_like(seed[0], batch)) if seed.numel() == 2 else (seed[2] + seed[3] * index, seed[4])


def keep_mask(shape: Sequence[int], p: float, seed: Tensor) -> Tensor:
    """Which elements of a memory [L, 2, B, Hkv, M, D] a dropout keeps; a row of the stream is one [l, s, place of b]."""
    groups, batch, columns = shape[0] * shape[1], shape[2], math.prod(shape[3:])
    blocks = -(-columns // 4)
    index, total = places(seed, batch)
    row = torch.arange(groups, dtype=torch.int64, device=seed.device)[:, None] * total + index
    block = (row.reshape(-1, 1) * blocks + torch.arange(blocks, dtype=torch.int64, device=seed.device)).reshape(-1)
    words = philox.block_words(seed[0], seed[1].expand_as(block), block).view(groups * batch, blocks * 4)[:, :columns]
    return ((words >> 8) >= philox.dropout_threshold(p)).view(tuple(shape))


def latent_kv(
    z: Tensor, weight: Tensor, bias: Tensor | None, dropout: float, seed: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """z [B, nz], weight [L, 2, Hkv, M, D, nz], bias [L, 2, Hkv, M, D] -> memory [L, 2, B, Hkv, M, D]."""
    memory = (z @ weight.reshape(-1, weight.shape[-1]).T).view(z.shape[0], *weight.shape[:-1])
    if bias is not None:
        memory = memory + bias
    memory = memory.permute(1, 2, 0, 3, 4, 5)
    if dropout > 0.0:
        assert seed is not None
        memory = memory * (keep_mask(memory.shape, dropout, seed) * (1.0 / (1.0 - dropout))).to(memory.dtype)
    return memory.to(dtype).contiguous()


def weight_gradient(
    weight: Tensor, grads: Sequence[Tensor], zs: Sequence[Tensor], dropout: float, seeds: Sequence[Tensor]
) -> Tensor:
    """dW [L, 2, Hkv, M, D, nz] from forwards' dmemory [L, 2, B, Hkv, M, D] and z [B, nz]; fp32 (fp64 for fp64)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    for i, (grad, z) in enumerate(zip(grads, zs, strict=True)):
        grad = grad.to(wide)
        if dropout > 0.0:
            grad = grad * (keep_mask(grad.shape, dropout, seeds[i]) * (1.0 / (1.0 - dropout)))
        total += torch.einsum("lsbhmd,bn->lshmdn", grad, z.to(wide))
    return total


def adamw(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step in place: Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019), as torch.optim.AdamW."""
    wide = grad.dtype
    mean = exp_avg.to(wide).lerp(grad, 1.0 - beta1)
    square = exp_avg_sq.to(wide) * beta2 + (1.0 - beta2) * grad * grad
    bias1, bias2 = 1.0 - beta1 ** step.double(), 1.0 - beta2 ** step.double()
    denominator = square.sqrt() / bias2.sqrt().to(wide) + eps
    decayed = weight.to(wide) * (1.0 - lr.double() * weight_decay).to(wide)
    weight.copy_(decayed - (lr.double() / bias1).to(wide) * mean / denominator)
    exp_avg.copy_(mean)
    exp_avg_sq.copy_(square)
