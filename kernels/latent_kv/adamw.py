"""AdamW for the weight of latent_kv, applied without ever making the weight's gradient.

With G [B, rows] the gradient of the memory and Z [B, nz] the latents, dW = G^T Z has rank <= B. Its norm, which
clipping needs first, comes from two Gram matrices: ||G^T Z||_F^2 = sum((G G^T) * (Z Z^T)). After that each tile of dW
is computed in registers or cache and used up by the optimizer at once, so W and its two moments are read and written
once, and nothing of W's size is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend
from ..inplace import written
from ..registration import define, primitives
from . import reference
from .checks import check_gradients, check_step

# ---- primitives ------------------------------------------------------------------------------------------------------


def _fake_norm(weight, grads, zs, seeds, dropout):
    return weight.new_empty((), dtype=torch.promote_types(weight.dtype, torch.float32))


def _fake_adamw(*args):
    return None


def _triton_norm(*args):
    from .triton import latent_kv_norm

    return latent_kv_norm(*args)


def _triton_adamw(*args):
    from .triton import latent_kv_adamw

    latent_kv_adamw(*args)


define(
    "latent_kv_norm(Tensor weight, Tensor[] grads, Tensor[] zs, Tensor[] seeds, float dropout) -> Tensor",
    fake=_fake_norm,
    triton=_triton_norm,
)
define(
    "latent_kv_adamw(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor[] grads, Tensor[] zs, "
    "Tensor[] seeds, float dropout, Tensor step, Tensor lr, Tensor clip, float beta1, float beta2, float eps, "
    "float weight_decay) -> ()",
    fake=_fake_adamw,
    triton=_triton_adamw,
)

# ---- functions -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def latent_kv_norm(
    weight: Tensor, grads: Sequence[Tensor], zs: Sequence[Tensor], *, dropout: float = 0.0, seeds: Sequence[Tensor] = ()
) -> Tensor:
    """||dW||_F^2 of latent_kv, without dW, as a scalar tensor on the device (fp32; fp64 for an fp64 weight).

    Args:
        weight: ``[L, 2, Hkv, M, D, nz]``; gives shape and dtype, its values are not read.
        grads: gradients of the memories, each ``[L, 2, B, Hkv, M, D]``, one for each forward (micro-batch).
        zs: the latents of those forwards, each ``[B, nz]``.
        dropout, seeds: of those forwards; each seed an int64 tensor [2] or [5], as `latent_kv` takes it.

    Raises ValueError or TypeError naming the argument. No host synchronisation.
    """
    check_gradients(weight, grads, zs, seeds, dropout)
    choice = backend.choose("latent_kv", weight)
    if choice == "reference":
        return reference.weight_gradient(weight, grads, zs, dropout, seeds).square().sum()
    return primitives(choice, weight).latent_kv_norm(weight, list(grads), list(zs), list(seeds), dropout)


@torch.no_grad()
def latent_kv_adamw(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grads: Sequence[Tensor],
    zs: Sequence[Tensor],
    *,
    step: Tensor,
    lr: Tensor,
    clip: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    dropout: float = 0.0,
    seeds: Sequence[Tensor] = (),
) -> None:
    """One AdamW step of latent_kv's weight with the gradient ``clip * dW``; weight and moments change in place.

    Args:
        weight, exp_avg, exp_avg_sq: ``[L, 2, Hkv, M, D, nz]``, the last dim contiguous; the moments have one dtype.
        grads, zs, dropout, seeds: as for `latent_kv_norm`.
        step, lr, clip: scalar tensors on weight's device: the number of this step (from 1), the learning rate, and the
            factor on the gradient (for norm clipping: min(1, max_norm / (total norm + 1e-6))). Read on the device.
        betas, eps, weight_decay: as in torch.optim.AdamW; its order of operations is kept.

    Raises ValueError or TypeError naming the argument. No host synchronisation on CUDA.
    """
    check_gradients(weight, grads, zs, seeds, dropout)
    check_step(weight, exp_avg, exp_avg_sq, step, lr, clip)
    choice = backend.choose("latent_kv", weight)
    if choice == "reference":
        grad = reference.weight_gradient(weight, grads, zs, dropout, seeds)
        reference.adamw(weight, exp_avg, exp_avg_sq, grad * clip, step, lr, *betas, eps, weight_decay)
        return
    primitives(choice, weight).latent_kv_adamw(
        weight, exp_avg, exp_avg_sq, list(grads), list(zs), list(seeds), dropout, step, lr, clip,
        *betas, eps, weight_decay,
    )  # fmt: skip
    written(weight, exp_avg, exp_avg_sq)
