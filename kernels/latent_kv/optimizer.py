"""LatentKVAdamW: AdamW of one latent_kv weight as a torch optimizer, fed by the backward pass; adamw.py has the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..registration import tangents
from . import reference
from .adamw import latent_kv_adamw, latent_kv_norm
from .held_gradient import HeldGradient
from .op import latent_kv, stream_tensor

Factors = tuple[
    Tensor, Tensor, "Tensor | None"
]  # dmemory [L, 2, B, Hkv, M, D], z [B, nz], the dropout's seed [2] or [5]


class _Carry(torch.autograd.Function):
    """The memory, with its gradient left in `found` on the way back. `handle` is a leaf that stands for the weight."""

    @staticmethod
    def forward(ctx: Any, memory: Tensor, handle: Tensor, found: list[Tensor]) -> Tensor:
        ctx.found = found
        ctx.set_materialize_grads(False)
        return memory.view_as(memory)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return None, None, None
        ctx.found[:] = [grad.detach()]
        return grad, grad.new_empty(0), None


class _Once(torch.autograd.Function):
    """z, whose gradient W^T dmemory has no derivative: the weight enters it as a constant, so its part would be lost."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _Refused.apply(grad) if grad.requires_grad else grad


class _Refused(torch.autograd.Function):
    """A gradient as it is; an error on the way back through it."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError(
            "LatentKVAdamW.project: the gradient of z has no derivative (a gradient penalty, a Hessian), because the weight "
            "gets no gradient from autograd; use latent_kv(z, weight) and torch.optim.AdamW for such a loss"
        )


#: Options of a torch.optim.AdamW state that would make another step, and their values that do not.
_FIXED = {"amsgrad": False, "differentiable": False, "decoupled_weight_decay": True}


def _check_options(group: dict[str, Any]) -> None:
    for name, value in _FIXED.items():
        if group.get(name, value) != value:
            raise ValueError(
                f"LatentKVAdamW has no {name}={group[name]}: only {value}; use torch.optim.AdamW for this weight"
            )


class LatentKVAdamW(torch.optim.Optimizer):
    """AdamW of one latent_kv weight, in the backward pass: the weight never gets a gradient.

    ::

        optimizer = LatentKVAdamW(weight, lr=1e-3)              # bias and all else: an ordinary torch optimizer
        memory = optimizer.project(z, bias, dropout=0.1)         # instead of latent_kv(z, weight, bias, ...)
        loss_of(memory).backward()                               # gives dz and db; keeps dmemory and z. May be repeated
        total = (optimizer.norm_sq() + sum(p.grad.square().sum() for p in others)).sqrt()
        optimizer.step(clip=torch.clamp(max_norm / (total + 1e-6), max=1.0))   # clip for the others' gradients as well

    Between backward and step it holds dmemory and z of every forward (micro-batches add up): B / nz of the size of dW.
    ``weight.grad`` is a `HeldGradient` meanwhile: without numbers, but ``module.zero_grad()`` forgets it. As in torch, what
    does not accumulate (``torch.autograd.grad``, ``backward(inputs=...)``) keeps nothing, and a weight that does not require
    a gradient does not move.
    Equal to backward, `clip_grad_norm_` and `torch.optim.AdamW` up to rounding. State (step, exp_avg, exp_avg_sq),
    `param_groups` (for learning-rate schedulers), `state_dict` and `load_state_dict` are those of torch.optim.AdamW,
    so checkpoints of the two are interchangeable, but for options that it does not have (amsgrad): those are refused. A
    GradScaler is refused too, as soon as it looks at the gradient.

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
        return sum(z.shape[0] for _, z, _ in self._held())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """For the base class; raises ValueError for a second group, as nothing would update it."""
        if self.param_groups:
            raise ValueError("LatentKVAdamW updates one weight: give other parameters an optimizer of their own")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        own = ("shape", "state_dtype", "_dropout", "_kept")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict gives only a part
        if state.get("_kept"):
            self.weight.grad = HeldGradient(self.weight, self._forget)

    def _forget(self) -> None:
        self._kept.clear()

    def _held(self) -> list[Factors]:
        """The gradients held: none once somebody has taken them off the weight."""
        grad = self.weight.grad
        if grad is not None and not isinstance(grad, HeldGradient):
            raise RuntimeError(
                "the weight has a gradient that did not come through project(), which LatentKVAdamW would leave out: call "
                "zero_grad(), and use the weight through project() only"
            )
        if grad is None:
            self._kept.clear()
        return self._kept

    def _keep(self, grad: Tensor, latent: Tensor, stream: Tensor | None, dropout: float) -> None:
        held = self._held()
        if not held:
            self.weight.grad = HeldGradient(self.weight, self._forget)
        self._dropout = dropout
        held.append((grad, latent, stream))

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
        dropout probability. Not for use inside torch.compile (it has a hook). Raises as `latent_kv`, and ValueError for
        slots outside 0 to M.
        """
        if slots is not None and not 0 <= slots <= self.shape[3]:
            raise ValueError(f"slots={slots} must be 0 to the {self.shape[3]} slots of the weight")
        if self._held() and dropout != self._dropout:
            raise ValueError(f"dropout={dropout} differs from {self._dropout} of gradients that wait for step()")
        stream = stream_tensor(seed, z.device) if dropout > 0.0 else None
        weight = self.weight.detach().view(self.shape)[:, :, :, :slots]
        if tangents(z, bias):
            raise ValueError(
                "LatentKVAdamW.project has no forward-mode derivative: z and bias must not carry a tangent; use latent_kv"
            )
        graded = torch.is_grad_enabled() and self.weight.requires_grad
        latent_in = _Once.apply(z) if graded and z.requires_grad else z
        memory = latent_kv(latent_in, weight, bias, dropout=dropout, seed=stream, dtype=dtype)
        if not graded:
            return memory
        latent = z.detach().to(self.weight.dtype)
        handle, found = torch.empty(0, device=memory.device, requires_grad=True), []  # type: tuple[Tensor, list[Tensor]]

        def keep(_: Tensor) -> None:  # runs where autograd accumulates into leaves, and nowhere else
            handle.grad = None
            self._keep(found.pop(), latent, stream, dropout)

        handle.register_post_accumulate_grad_hook(keep)
        return _Carry.apply(memory, handle, found)

    def exchange(self, gather: Callable[[list[Factors]], list[Factors]]) -> None:
        """Replace the factors held, (dmemory, z, seed) of each forward, by ``gather`` of them: what several processes hold
        together is the gradient of all their sentences."""
        self._kept = gather(self._held())
        self.weight.grad = HeldGradient(self.weight, self._forget) if self._kept else None

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
        if not self._held():
            return self.weight.new_zeros((), dtype=torch.promote_types(self.weight.dtype, torch.float32))
        slots, grads, zs, dropout, seeds = self._gradients()
        return latent_kv_norm(self.weight.view(self.shape)[:, :, :, :slots], grads, zs, dropout=dropout, seeds=seeds)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, clip: Tensor | float | None = None
    ) -> Any:
        """One AdamW step with the gradient ``clip * dW`` (clip: a scalar tensor on the device, or 1), then forget it.

        Without a gradient nothing changes, as in torch.optim for a parameter without one. closure: computes the loss and
        its gradients first; its value is returned.
        """
        if closure is not None and not callable(closure):
            raise TypeError(
                f"closure must be a function, got {type(closure).__name__}; a factor on the gradient is clip=..."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._held():
            return loss
        weight, group = self.weight, self.param_groups[0]
        _check_options(group)
        state, factor = self.state[weight], 1.0 if clip is None else clip
        slots, grads, zs, dropout, seeds = self._gradients()
        tensors = [x.view(self.shape) for x in (weight, state["exp_avg"], state["exp_avg_sq"])]
        options: dict[str, Any] = {
            "step": state["step"], "lr": self._scalar(group["lr"], torch.float64),
            "clip": self._scalar(-factor if group.get("maximize") else factor), "betas": group["betas"],
            "eps": group["eps"], "weight_decay": group["weight_decay"],
        }  # fmt: skip
        seen = (x[:, :, :, :slots] for x in tensors)
        state["step"] += 1
        try:
            latent_kv_adamw(*seen, grads, zs, dropout=dropout, seeds=seeds, **options)
        except Exception:
            state["step"] -= 1
            raise
        if slots < self.shape[3]:  # the others' gradient is zero: their moments fade, as torch's AdamW has it
            unseen = [x[:, :, :, slots:] for x in tensors]
            layers, two, heads, count, dim, _ = unseen[0].shape
            nothing = grads[0].new_empty(layers, two, 0, heads, count, dim)
            latent_kv_adamw(*unseen, [nothing], [zs[0][:0]], **options)
        self.zero_grad()
        return loss

    def _scalar(self, x: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
        # torch.full is a fill, not a copy from the host: allowed under CUDA graph capture
        return x if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=self.weight.device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients held."""
        self._kept.clear()
        self.weight.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a LatentKVAdamW or a torch.optim.AdamW of this weight; the moments keep `state_dtype`.

        Raises ValueError, and takes nothing, for moments of another shape and for options that it does not have.
        """
        for group in state_dict["param_groups"]:
            _check_options(group)
        saved = next(iter(state_dict["state"].values()), None)
        for name in ("exp_avg", "exp_avg_sq"):
            if saved is not None and saved[name].shape != self.weight.shape:
                have = f"{name} of the state is {list(saved[name].shape)}"
                raise ValueError(f"{have}, the weight is {list(self.weight.shape)}: they must have one shape")
        super().load_state_dict(state_dict)
        state = self.state[self.weight]
        if saved is None:
            self._init_state()
            return
        for name in ("exp_avg", "exp_avg_sq"):  # the base class has cast them to the weight's dtype
            state[name] = saved[name].to(device=self.weight.device, dtype=self.state_dtype, copy=True).contiguous()
        state["step"] = torch.as_tensor(saved["step"], dtype=torch.float32).to(self.weight.device, copy=True)
