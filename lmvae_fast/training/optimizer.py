"""The optimizer of a run: AdamW over all that trains, with the global norm clipped.

Where the model's projector is one `latent_kv` map, its weight (most of what trains) is updated by `LatentKVAdamW`: the
gradient of that weight is never made, and its share of the global norm comes from two Gram matrices. The rest goes
through torch's fused AdamW; of layers that ranks hold in pieces (`sharding.py`), each updates its own. All together do
what one AdamW over everything does, up to rounding.
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
from lmvae_fast.models.sharded_tensors import in_pieces, whole
from lmvae_fast.training.checkpoints.tensors import optimizer_tensors, restore_optimizer
from lmvae_fast.training.distributed import Ranks
from lmvae_fast.training.row_adamw import RowAdamW, embedding_by_rows


class Optimizer:
    """AdamW and clipping for one run.

    Args:
        model: an LMVAE; its projector is looked at.
        parameters: name -> parameter of everything that trains, as it is held during the run.
        config: learning rate, AdamW's settings, `grad_clip`, `precision`, `fused_projector_update`, `embedding_rows_update`.
        ranks: of the run.
        recorded: steps are recorded: the learning rate is a tensor on the device.
    """

    def __init__(
        self, model: Any, parameters: Mapping[str, nn.Parameter], config: TrainConfig, ranks: Ranks | None = None,
        *, recorded: bool = False,
    ) -> None:  # fmt: skip
        self.grad_clip = config.grad_clip
        self._all = list(parameters.values())
        self.rows: RowAdamW | None = None
        self._rows_name = ""
        if config.embedding_rows_update:
            self._rows_name = embedding_by_rows(model, parameters, config, ranks is None or ranks.alone)
            options_of_rows: dict[str, Any] = {
                "lr": config.learning_rate, "betas": config.adam_betas, "eps": config.adam_eps
            }  # fmt: skip
            self.rows = RowAdamW(model.decoder.model.get_input_embeddings(), **options_of_rows)
            parameters = {name: value for name, value in parameters.items() if name != self._rows_name}
        device = next(iter(parameters.values())).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.projector = _fusible(model, parameters, config)
        weight = None if self.projector is None else self.projector.weight
        self._fused_name = {name: value for name, value in parameters.items() if value is weight}
        rest = {name: value for name, value in parameters.items() if value is not weight}
        # torch's foreach functions take tensors or pieces of them, not both at once
        self._whole = {name: value for name, value in rest.items() if not in_pieces(value)}
        pieces = {name: value for name, value in rest.items() if in_pieces(value)}
        options: dict[str, Any] = {
            "lr": config.learning_rate,
            "betas": config.adam_betas,
            "eps": config.adam_eps,
            "weight_decay": config.weight_decay,
        }
        fused = device.type in ("cpu", "cuda")
        parts = [self._whole, pieces] if pieces else [self._whole]
        self._adamw = [(torch.optim.AdamW(part.values(), fused=fused, **options), part) for part in parts]
        self.fused: LatentKVAdamW | None = None
        if self.projector is not None:
            self.fused = LatentKVAdamW(self.projector.weight, self.projector.shape, **options)
        self._rate = config.learning_rate
        # Of the precisions that torch's kernel and ours take.
        self._rates = [
            torch.zeros((), dtype=dtype, device=device) for dtype in (torch.float32, torch.float64)
        ] * recorded
        self.learning_rate = config.learning_rate

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """While this lasts, the projector hands the gradients of its memory to the fused update, and an embedding that is
        updated by rows has a gradient of rows."""
        with contextlib.nullcontext() if self.rows is None else self.rows.attached():
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
        return self._rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._rate = value
        for rate in self._rates:
            rate.fill_(value)
        for optimizer, _ in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._rates[optimizer is self.fused] if self._rates else value
                if self._rates and optimizer is not self.fused:
                    group["capturable"] = True
        if self.rows is not None:
            self.rows.lr = value

    @property
    def _optimizers(self) -> list[tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]]:
        """Each with what it updates."""
        fused = [] if self.fused is None else [(self.fused, self._fused_name)]
        return [*self._adamw, *fused]

    def synchronize(self, ranks: Ranks) -> None:
        """Make the gradients those of all ranks' sentences together; before `norm`, once a step.

        Pieces have theirs already: FSDP sums them in backward.
        """
        if ranks.alone:
            return
        ranks.sum_gradients(self._whole.values())
        if self.fused is not None:
            self.fused.exchange(ranks.gather_factors)

    def norm(self) -> Tensor:
        """Unscale the gradients (fp16); their global norm before clipping, a scalar on the device."""
        norms = []
        for adamw, part in self._adamw:
            self.scaler.unscale_(adamw)
            norm = torch.nn.utils.get_total_norm([p.grad for p in part.values() if p.grad is not None])
            norms.append(whole(norm))
        if len(norms) == 1 and self.fused is None and self.rows is None:
            return norms[0]
        squares = [norm.square() for norm in norms]
        if self.rows is not None:
            squares.append(self.rows.norm_sq())
        if self.fused is not None:
            # A sum of squares, but from Gram matrices: rounding may leave a zero slightly negative. NaN passes the clamp.
            squares.append(self.fused.norm_sq().clamp_min(0.0))
        return sum(squares[1:], start=squares[0]).sqrt()

    def step(self, norm: Tensor) -> None:
        """Clip by `norm`, update, and forget the gradients."""
        clip = None
        if self.grad_clip is not None:
            for _, part in self._adamw:
                torch.nn.utils.clip_grads_with_norm_(part.values(), self.grad_clip, norm)
            clip = torch.clamp(self.grad_clip / (norm + 1e-6), max=1.0)
        for adamw, _ in self._adamw:
            self.scaler.step(adamw)
        self.scaler.update()
        if self.fused is not None:
            self.fused.step(clip=clip)
        if self.rows is not None:
            self.rows.step(clip=clip)
        # A fused AdamW leaves no trace in a tensor's version, by which whoever holds something made from it would see it.
        torch.autograd.graph.increment_version(self._all)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer, _ in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.rows is not None:
            self.rows.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state as "<parameter name>/<key>" -> tensor, the same whichever way the weight is updated."""
        flat: dict[str, Tensor] = {}
        for optimizer, part in self._optimizers:
            flat |= optimizer_tensors(optimizer, part)
        if self.rows is not None:
            flat |= {f"{self._rows_name}/{key}": value for key, value in self.rows.tensors().items()}
        return flat

    def restore(self, flat: Mapping[str, Tensor]) -> None:
        """Put a state of `tensors` back. Raises CheckpointError if it is of other parameters."""
        states: list[dict[str, Tensor]] = [{} for _ in self._optimizers]
        of_rows: dict[str, Tensor] = {}
        for path, value in flat.items():
            name, _, key = path.rpartition("/")
            if self.rows is not None and name == self._rows_name:
                of_rows[key] = value
                continue
            owner = [name in part for _, part in self._optimizers]
            states[owner.index(True) if any(owner) else 0][path] = value  # what nobody has, the first one refuses
        if self.rows is not None:
            self.rows.restore(of_rows)
        if self.fused is not None and not states[-1]:
            raise CheckpointError(
                "the checkpoint has no optimizer state of the projector's weight",
                value=list(self._fused_name),
                remedy="resume with the configuration the run was started with",
            )
        for (optimizer, part), state in zip(self._optimizers, states, strict=True):
            restore_optimizer(optimizer, part, state)
        self.learning_rate = self._rate  # what has been loaded has copies of the tensors


def _fusible(model: Any, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> LinearProjector | None:
    """The model's projector if its weight can be updated in the backward pass.

    Not with a gradient scaler, which must see every gradient before it decides; and not where nothing else trains, for
    the memory's gradient is then not asked for.
    """
    projector = getattr(model, "projector", None)
    if not isinstance(projector, LinearProjector) or not config.fused_projector_update or config.precision == "fp16":
        return None
    trains = any(value is projector.weight for value in parameters.values())
    return projector if trains and len(parameters) > 1 else None
