"""The update of an optimizer step: AdamW over all that trains, with the global norm clipped.

Where the model's projector is one `latent_kv` map, its weight (most of what trains) is updated by `LatentKVAdamW`: the
gradient of that weight is never made, and its share of the global norm comes from two Gram matrices. The rest goes
through torch's fused AdamW. Both together do what one AdamW over everything does, up to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmvae_fast.config import TrainConfig
from lmvae_fast.errors import CheckpointError
from lmvae_fast.kernels.latent_kv import LatentKVAdamW
from lmvae_fast.models.projectors import LinearProjector
from lmvae_fast.training.distributed import Ranks
from lmvae_fast.training.state import optimizer_tensors, restore_optimizer


class Update:
    """AdamW and clipping for one run.

    Args:
        model: an LMVAE; its projector is looked at.
        parameters: name -> parameter of everything that trains.
        config: learning rate, AdamW's settings, `grad_clip`, `precision` and `fused_projector_update`.
    """

    def __init__(self, model: Any, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        self.grad_clip = config.grad_clip
        device = next(iter(parameters.values())).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.projector = _fusible(model, parameters, config)
        weight = None if self.projector is None else self.projector.weight
        self._rest = {name: value for name, value in parameters.items() if value is not weight}
        self._fused_name = {name: value for name, value in parameters.items() if value is weight}
        options: dict[str, Any] = {
            "lr": config.learning_rate, "betas": config.adam_betas, "eps": config.adam_eps,
            "weight_decay": config.weight_decay,
        }  # fmt: skip
        self.optimizer = torch.optim.AdamW(self._rest.values(), fused=device.type in ("cpu", "cuda"), **options)
        self.fused: LatentKVAdamW | None = None
        if self.projector is not None:
            self.fused = LatentKVAdamW(self.projector.weight, self.projector.shape, **options)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """While this lasts, the projector hands the gradients of its memory to the fused update."""
        if self.projector is None:
            yield
            return
        self.projector.fused = self.fused
        try:
            yield
        finally:
            self.projector.fused = None
            self.zero_grad()

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = value

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer] if self.fused is None else [self.optimizer, self.fused]

    def synchronize(self, ranks: Ranks) -> None:
        """Make the gradients those of all ranks' sentences together; before `norm`, once a step."""
        if ranks.alone:
            return
        ranks.sum_gradients(self._rest.values())
        if self.fused is not None:
            self.fused.exchange(ranks.gather_factors)

    def norm(self) -> Tensor:
        """Unscale the gradients (fp16); their global norm before clipping, a scalar on the device."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._rest.values() if p.grad is not None])
        if self.fused is None:
            return norm
        # A sum of squares, but from Gram matrices: rounding may leave a zero slightly negative. NaN passes the clamp.
        return (norm.square() + self.fused.norm_sq().clamp_min(0.0)).sqrt()

    def step(self, norm: Tensor) -> None:
        """Clip by `norm`, update, and forget the gradients."""
        clip = None
        if self.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._rest.values(), self.grad_clip, norm)
            clip = torch.clamp(self.grad_clip / (norm + 1e-6), max=1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.fused is not None:
            self.fused.step(clip)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state as "<parameter name>/<key>" -> tensor, the same whichever way the weight is updated."""
        flat = optimizer_tensors(self.optimizer, self._rest)
        return flat if self.fused is None else flat | optimizer_tensors(self.fused, self._fused_name)

    def restore(self, flat: Mapping[str, Tensor]) -> None:
        """Put a state of `tensors` back. Raises CheckpointError if it is of other parameters."""
        parts: list[dict[str, Tensor]] = [{}, {}]
        for path, value in flat.items():
            parts[path.rpartition("/")[0] in self._fused_name][path] = value
        restore_optimizer(self.optimizer, self._rest, parts[0])
        if self.fused is None:
            return
        if not parts[1]:
            raise CheckpointError(
                "the checkpoint has no optimizer state of the projector's weight", value=list(self._fused_name),
                remedy="resume with the configuration the run was started with",
            )  # fmt: skip
        restore_optimizer(self.fused, self._fused_name, parts[1])


def _fusible(
    model: Any, parameters: Mapping[str, nn.Parameter], config: TrainConfig
) -> LinearProjector | None:
    """The model's projector if its weight can be updated in the backward pass.

    Not with a gradient scaler, which must see every gradient before it decides; and not where nothing else trains, for
    the memory's gradient is then not asked for.
    """
    projector = getattr(model, "projector", None)
    if not isinstance(projector, LinearProjector) or not config.fused_projector_update or config.precision == "fp16":
        return None
    trains = any(value is projector.weight for value in parameters.values())
    return projector if trains and len(parameters) > 1 else None
