"""What a latent adds to a decoder: one small value object.

Every system this package runs differs only in these four parts; attention, training and generation see nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Injection:
    """What ``batch`` latents add to one decoder.

    Attributes:
        visibility: which slots and tokens a token sees: ``prefix``, ``rolling`` or ``interleaved``
            (rules in ``kernels/latent_attention/visibility.py``).
        memory: keys and values, ``[layers, 2, batch, kv_heads, slots, head_dim]``, or None.
        embedding_shift: vector added to every token embedding, ``[batch, hidden]`` (Optimus), or None.
        output_residual: vector added to the final hidden state at every position, ``[batch, hidden]``, or None. A
            producer that wants it in the gradient only passes ``g - g.detach()`` (G-Skip).
    """

    visibility: str
    memory: Tensor | None = None
    embedding_shift: Tensor | None = None
    output_residual: Tensor | None = None

    @property
    def slots(self) -> int:
        """Memory slots per layer."""
        return 0 if self.memory is None else self.memory.shape[4]

    @property
    def batch_size(self) -> int:
        """Number of latents."""
        for part, dim in ((self.memory, 2), (self.embedding_shift, 0), (self.output_residual, 0)):
            if part is not None:
                return part.shape[dim]
        raise ValueError("an injection without memory, embedding shift and output residual has no batch")

    def detach(self) -> Injection:
        """The same values without their graph (for the gradient-free greedy pass)."""
        return self._map(torch.Tensor.detach)

    def select(self, rows: Tensor | slice) -> Injection:
        """The injection of some of the latents."""
        return Injection(
            self.visibility,
            None if self.memory is None else self.memory[:, :, rows],
            None if self.embedding_shift is None else self.embedding_shift[rows],
            None if self.output_residual is None else self.output_residual[rows],
        )

    def _map(self, function) -> Injection:
        parts = (self.memory, self.embedding_shift, self.output_residual)
        return Injection(self.visibility, *(None if part is None else function(part) for part in parts))
