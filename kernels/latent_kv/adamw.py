"""AdamW for the weight of latent_kv, applied without ever making the weight's gradient.

With G [B, rows] the gradient of the memory and Z [B, nz] the latents, dW = G^T Z has rank <= B. Its norm, which
clipping needs first, comes from two Gram matrices: ||G^T Z||_F^2 = sum((G G^T) * (Z Z^T)). After that each tile of dW
is computed in registers or cache and used up by the optimizer at once, so W and its two moments are read and written
once, and nothing of W's size is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..registration import define, primitives
from . import reference
from .checks import check_gradients, check_step
from .op import latent_kv, stream_tensor

Factors = tuple[
    Tensor, Tensor, "Tensor | None"
]  # dmemory [L, 2, B, Hkv, M, D], z [B, nz], the dropout's seed [2] or [5]

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


# ---- the optimizer ---------------------------------------------------------------------------------------------------


class LatentKVAdamW(torch.optim.Optimizer):
    """AdamW of one latent_kv weight, in the backward pass: the weight never gets a gradient.

    ::

        optimizer = LatentKVAdamW(weight, lr=1e-3)              # bias and all else: an ordinary torch optimizer
        memory = optimizer.project(z, bias, dropout=0.1)         # instead of latent_kv(z, weight, bias, ...)
        loss_of(memory).backward()                               # gives dz and db; keeps dmemory and z. May be repeated
        total = (optimizer.norm_sq() + sum(p.grad.square().sum() for p in others)).sqrt()
        optimizer.step(torch.clamp(max_norm / (total + 1e-6), max=1.0))   # clip for the others' gradients as well

    Between backward and step it holds dmemory and z of every forward (micro-batches add up): B / nz of the size of dW.
    Equal to backward, `clip_grad_norm_` and `torch.optim.AdamW` up to rounding. State (step, exp_avg, exp_avg_sq),
    `param_groups` (for learning-rate schedulers), `state_dict` and `load_state_dict` are those of torch.optim.AdamW,
    so checkpoints of the two are interchangeable.

    Args:
        weight: a parameter of any shape and contiguous, whose elements are those of ``[L, 2, Hkv, M, D, nz]``.
        shape: (L, 2, Hkv, M, D); not needed when weight has six dims.
        lr: learning rate, a float or a scalar tensor on the device (to change it inside a captured CUDA graph).
        betas, eps, weight_decay: as in torch.optim.AdamW.
        state_dtype: of the moments; None means fp32 for half-precision weights (in bf16, a mean over 1000 steps stands
            still), else weight's dtype.

    Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        weight: Tensor,
        shape: Sequence[int] | None = None,
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_dtype: torch.dtype | None = None,
    ):
        shape = tuple(weight.shape[:-1] if shape is None else shape)
        if len(shape) != 5 or shape[1] != 2:
            raise ValueError(f"shape must be (L, 2, Hkv, M, D), got {shape} for a weight of {list(weight.shape)}")
        if not weight.is_contiguous():
            raise ValueError(f"weight must be contiguous, got strides {weight.stride()} for {list(weight.shape)}")
        nz = weight.shape[-1]
        if torch.Size(shape).numel() * nz != weight.numel():
            raise ValueError(f"shape {shape} with nz = {nz} does not hold the elements of weight {list(weight.shape)}")
        if not min(float(lr), eps, weight_decay) >= 0.0:
            raise ValueError(f"lr={lr}, eps={eps} and weight_decay={weight_decay} must not be negative")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas={betas} must lie in [0, 1)")
        super().__init__([weight], {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.shape = (*shape, nz)
        self.state_dtype = state_dtype or torch.promote_types(weight.dtype, torch.float32)
        self._dropout = 0.0
        self._kept: list[Factors] = []
        self._init_state()

    @property
    def weight(self) -> Tensor:
        """The parameter, in the shape it was given."""
        return self.param_groups[0]["params"][0]

    @property
    def rank(self) -> int:
        """Sentences whose gradients are held, an upper bound of the rank of dW."""
        return sum(z.shape[0] for _, z, _ in self._kept)

    def _init_state(self) -> None:
        weight, state = self.weight, self.state[self.weight]
        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(weight, dtype=self.state_dtype, memory_format=torch.contiguous_format)

    def project(
        self,
        z: Tensor,
        bias: Tensor | None = None,
        *,
        dropout: float = 0.0,
        seed: int | Tensor | None = None,
        dtype: torch.dtype | None = None,
        slots: int | None = None,
    ) -> Tensor:
        """`latent_kv` with this weight. In its backward, z and bias get gradients; dmemory and z are kept for `step`.

        slots: make only the first so many of the M slots, and take bias ``[L, 2, Hkv, slots, D]``: memory that nothing
        reads need not be made, and has no gradient. Forwards between two steps may differ in it, but must have one
        dropout probability. Not for use inside torch.compile (it has a hook).
        """
        if self._kept and dropout != self._dropout:
            raise ValueError(f"dropout={dropout} differs from {self._dropout} of gradients that wait for step()")
        stream = stream_tensor(seed, z.device) if dropout > 0.0 else None
        weight = self.weight.detach().view(self.shape)[:, :, :, :slots]
        memory = latent_kv(z, weight, bias, dropout=dropout, seed=stream, dtype=dtype)
        if not torch.is_grad_enabled():
            return memory
        if not memory.requires_grad:
            memory.requires_grad_()
        latent = z.detach().to(self.weight.dtype)

        def keep(grad: Tensor) -> None:
            self._dropout = dropout
            self._kept.append((grad.detach(), latent, stream))

        memory.register_hook(keep)
        return memory

    def exchange(self, gather: Callable[[list[Factors]], list[Factors]]) -> None:
        """Replace the factors held, (dmemory, z, seed) of each forward, by ``gather`` of them: what several processes hold
        together is the gradient of all their sentences."""
        self._kept = gather(self._kept)

    def _gradients(self) -> tuple[int, list[Tensor], list[Tensor], float, list[Tensor]]:
        """Slots that have gradients, and what `latent_kv_norm` takes of them: grads, zs, dropout, seeds."""
        grads, zs, seeds = (list(x) for x in zip(*self._kept, strict=True))
        slots = max(grad.shape[4] for grad in grads)
        if self._dropout == 0.0:
            seeds = []
        if all(grad.shape[4] == slots for grad in grads):
            return slots, grads, zs, self._dropout, seeds
        # An element's place in the mask depends on the number of slots, so the masks are applied before filling up.
        scale = 1.0 / (1.0 - self._dropout)
        for i, seed in enumerate(seeds):
            grads[i] = grads[i] * (reference.keep_mask(grads[i].shape, self._dropout, seed) * scale).to(grads[i].dtype)
        grads = [torch.nn.functional.pad(grad, (0, 0, 0, slots - grad.shape[4])) for grad in grads]
        return slots, grads, zs, 0.0, []

    @torch.no_grad()
    def norm_sq(self) -> Tensor:
        """||dW||_F^2 of all gradients held, a scalar tensor on the device; zero when there are none."""
        if not self._kept:
            return self.weight.new_zeros((), dtype=torch.promote_types(self.weight.dtype, torch.float32))
        slots, grads, zs, dropout, seeds = self._gradients()
        return latent_kv_norm(self.weight.view(self.shape)[:, :, :, :slots], grads, zs, dropout=dropout, seeds=seeds)

    @torch.no_grad()
    def step(self, clip: Tensor | float | None = None) -> None:  # type: ignore[override]
        """One AdamW step with the gradient ``clip * dW`` (clip: a scalar tensor on the device, or 1), then forget it.

        Without a gradient nothing changes, as in torch.optim for a parameter without one.
        """
        if not self._kept:
            return
        weight, group = self.weight, self.param_groups[0]
        state = self.state[weight]
        state["step"] += 1
        slots, grads, zs, dropout, seeds = self._gradients()
        tensors = [x.view(self.shape) for x in (weight, state["exp_avg"], state["exp_avg_sq"])]
        options: dict[str, Any] = {
            "step": state["step"], "lr": self._scalar(group["lr"], torch.float64),
            "clip": self._scalar(1.0 if clip is None else clip), "betas": group["betas"], "eps": group["eps"],
            "weight_decay": group["weight_decay"],
        }  # fmt: skip
        seen = (x[:, :, :, :slots] for x in tensors)
        latent_kv_adamw(*seen, grads, zs, dropout=dropout, seeds=seeds, **options)
        if slots < self.shape[3]:  # the others' gradient is zero: their moments fade, as torch's AdamW has it
            unseen = [x[:, :, :, slots:] for x in tensors]
            layers, two, heads, count, dim, _ = unseen[0].shape
            nothing = grads[0].new_empty(layers, two, 0, heads, count, dim)
            latent_kv_adamw(*unseen, [nothing], [zs[0][:0]], **options)
        self._kept.clear()

    def _scalar(self, x: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
        # torch.full is a fill, not a copy from the host: allowed under CUDA graph capture
        return x if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=self.weight.device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients held."""
        self._kept.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a LatentKVAdamW or a torch.optim.AdamW of this weight; the moments keep `state_dtype`."""
        super().load_state_dict(state_dict)
        state = self.state[self.weight]
        if not state:
            self._init_state()
            return
        saved = next(iter(state_dict["state"].values()))
        for name in ("exp_avg", "exp_avg_sq"):  # the base class has cast them to the weight's dtype
            state[name] = saved[name].to(device=self.weight.device, dtype=self.state_dtype, copy=True).contiguous()
        state["step"] = torch.as_tensor(saved["step"], dtype=torch.float32).to(self.weight.device, copy=True)
