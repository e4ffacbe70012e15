"""AdamW of a token embedding that holds moments, and does work, only for the rows that have had a gradient.

Where weight decay is 0 that is what AdamW does, exactly: a row without a gradient so far has moments 0 and is moved by 0. A row
that has had one is moved at every later step by its momentum, so it stays among the rows that are worked on: the rows of the
last batch alone would not be exact. With weight decay every row moves at every step, and nothing can be left out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmvae_fast.errors import CheckpointError, ConfigError


class RowAdamW:
    """One embedding's optimizer.

    Args:
        module: the embedding; not tied to a head, whose gradient has every row.
        lr, betas, eps: of AdamW.

    Attributes:
        rows: those that have had a gradient, int64 ``[A]``, in the order in which they came.
        exp_avg, exp_avg_sq: their moments ``[A, width]``.
    """

    def __init__(self, module: nn.Embedding, *, lr: float, betas: tuple[float, float], eps: float) -> None:
        self.module, self.weight, self.lr, self.betas, self.eps = module, module.weight, lr, betas, eps
        self.step_count = 0
        self._place = torch.full(self.weight.shape[:1], -1, dtype=torch.int64, device=self.weight.device)
        self.rows = self._place.new_empty(0)
        self.exp_avg, self.exp_avg_sq = (self.weight.detach().new_empty(0, self.weight.shape[1]) for _ in range(2))

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """While this lasts, the embedding's gradient is made of the rows that a batch has read."""
        before, self.module.sparse = self.module.sparse, True
        try:
            yield
        finally:
            self.module.sparse = before

    def norm_sq(self) -> Tensor:
        """Squared norm of the gradient, a scalar; repeated rows are added up first."""
        gradient = self._gradient()
        return self.weight.new_zeros(()) if gradient is None else gradient.values().square().sum()

    def _gradient(self) -> Tensor | None:
        gradient = self.weight.grad
        if gradient is None:
            return None
        if not gradient.is_sparse:  # evaluated outside of `attached`, or added up with a dense one
            gradient = gradient.to_sparse(1)
        self.weight.grad = gradient = gradient.coalesce()
        return gradient

    @torch.no_grad()
    def step(self, clip: Tensor | None = None) -> None:
        """One update by the gradient times ``clip``."""
        self.step_count += 1
        gradient = self._gradient()
        if gradient is not None:
            self._admit(gradient.indices()[0])
        dense = torch.zeros_like(self.exp_avg)
        if gradient is not None:
            values = gradient.values() if clip is None else gradient.values() * clip
            dense.index_copy_(0, self._place[gradient.indices()[0]], values)
        (beta1, beta2), count = self.betas, self.step_count
        self.exp_avg.lerp_(dense, 1.0 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(dense, dense, value=1.0 - beta2)
        size = (self.exp_avg_sq.sqrt() / math.sqrt(1.0 - beta2**count)).add_(self.eps)
        moved = self.weight[self.rows].addcdiv_(self.exp_avg, size, value=-self.lr / (1.0 - beta1**count))
        self.weight.index_copy_(0, self.rows, moved)

    def _admit(self, rows: Tensor) -> None:
        """Rows that have a gradient for the first time get moments."""
        new = rows[self._place[rows] < 0]
        if not len(new):
            return
        self._place[new] = torch.arange(len(self.rows), len(self.rows) + len(new), device=new.device)
        self.rows = torch.cat([self.rows, new])
        more = self.exp_avg.new_zeros(len(new), self.exp_avg.shape[1])
        self.exp_avg, self.exp_avg_sq = torch.cat([self.exp_avg, more]), torch.cat([self.exp_avg_sq, more])

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.weight.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The state as torch's AdamW has it, moments of all rows."""
        whole = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        found = {
            name: torch.zeros_like(self.weight).index_copy(0, self.rows, value).detach()
            for name, value in whole.items()
        }
        return {"step": torch.tensor(float(self.step_count)), **found} if self.step_count else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state. Raises CheckpointError for one of another shape."""
        if not state:
            return
        moments = [state[name] for name in ("exp_avg", "exp_avg_sq")]
        if any(value.shape != self.weight.shape for value in moments):
            raise CheckpointError(
                "the checkpoint's optimizer state of the embedding has another shape", value=list(moments[0].shape),
                limit=list(self.weight.shape), remedy="resume with the configuration the run was started with",
            )  # fmt: skip
        self.step_count = int(state["step"])
        first, second = (value.to(self.weight) for value in moments)
        rows = (first.ne(0) | second.ne(0)).any(1).nonzero()[:, 0]
        self._place.fill_(-1)
        self._place[rows] = torch.arange(len(rows), device=rows.device)
        self.rows, self.exp_avg, self.exp_avg_sq = rows, first[rows], second[rows]


def embedding_by_rows(model: Any, parameters: Mapping[str, nn.Parameter], config: Any, alone: bool) -> str:
    """Name of the parameter that a run updates by rows.

    Raises ConfigError, naming why, where that would not be exact or there is nothing to gain: weight decay, an embedding that
    does not train or is the head's weight too, fp16's scaler, several processes, a sharded decoder.
    """
    module = model.decoder.model.get_input_embeddings()
    name = next((name for name, value in parameters.items() if value is getattr(module, "weight", None)), None)
    reasons = {
        f"weight_decay={config.weight_decay} moves every row at every step": config.weight_decay != 0.0,
        "the token embedding does not train": name is None,
        "the token embedding is the head's weight too, whose gradient has every row": model.decoder.head_weight
        is getattr(module, "weight", None),
        "the embedding is no nn.Embedding": not isinstance(module, nn.Embedding),
        "precision='fp16' scales gradients that it must see whole": config.precision == "fp16",
        "several processes share their gradients whole": not alone or config.shard,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(
                "the embedding cannot be updated by rows", value=reason, remedy="set embedding_rows_update=False"
            )
    assert name is not None
    return name
