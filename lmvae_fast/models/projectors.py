"""From a latent to memory: the learned maps that fill the K and V slots of every decoder layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lmvae_fast.kernels.latent_kv import LatentKVAdamW, keep_mask, latent_kv, stream_tensor


class LinearProjector(nn.Module):
    """Keys and values of every slot as a linear map of z (LangVAE).

    Args:
        latent_dim: width of the input.
        layers, kv_heads, slots, head_dim: shape of the memory.
        dropout: probability with which an element of the memory is dropped in training.
        hidden: width of a GELU layer before the map, or None (an ``mlp`` projector has one).

    Attributes:
        fused: the optimizer that updates ``weight`` within the backward pass, while a trainer has put one here; the
            weight then never gets a gradient. None otherwise.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        layers: int,
        kv_heads: int,
        slots: int,
        head_dim: int,
        dropout: float = 0.0,
        hidden: int | None = None,
    ):
        super().__init__()
        self.shape = (layers, 2, kv_heads, slots, head_dim)
        self.dropout = dropout
        self.fused: LatentKVAdamW | None = None
        self.hidden = None if hidden is None else nn.Linear(latent_dim, hidden)
        width = latent_dim if hidden is None else hidden
        rows = 2 * kv_heads * slots * head_dim
        self.weight = nn.Parameter(torch.empty(layers, rows, width))
        self.bias = nn.Parameter(torch.empty(layers, rows))
        bound = 1.0 / math.sqrt(width)  # nn.Linear's own initialisation, which LangVAE uses
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def start_at(self, memory: Tensor, scale: float) -> None:
        """Make every slot start as ``memory`` ``[layers, 2, kv_heads, head_dim]``, and what z adds to it ``scale`` times as
        large as it was drawn."""
        self.weight.mul_(scale)
        self.bias.view(self.shape).copy_(memory.unsqueeze(3))

    def forward(
        self,
        z: Tensor,
        *,
        dtype: torch.dtype,
        seed: Tensor | int | None = None,
        slots: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Memory ``[layers, 2, batch, kv_heads, slots, head_dim]`` in ``dtype`` for z ``[batch, latent_dim]``.

        slots: make only the first so many; None makes all. out: written in place, without a gradient, and returned: such a
        tensor of ``dtype`` with any strides but a dense last dimension.
        """
        if self.hidden is not None:
            z = nn.functional.gelu(self.hidden(z))
        z, bias = z.to(self.weight.dtype), self.bias.view(self.shape)[:, :, :, :slots]
        dropout = self.dropout if self.training else 0.0
        if self.fused is not None and out is None:
            return self.fused.project(z, bias, dropout=dropout, seed=seed, dtype=dtype, slots=slots)
        weight = self.weight.view(*self.shape, -1)[:, :, :, :slots]
        return latent_kv(z, weight, bias, dropout=dropout, seed=seed, out=out, dtype=dtype)


class SharedProjector(nn.Module):
    """One slot per layer, the same vector as key and as value (Optimus's "memory"); no bias."""

    def __init__(self, latent_dim: int, *, layers: int, kv_heads: int, head_dim: int, dropout: float = 0.0):
        super().__init__()
        self.layers, self.kv_heads, self.head_dim, self.dropout = layers, kv_heads, head_dim, dropout
        self.weight = nn.Parameter(torch.empty(layers * kv_heads * head_dim, latent_dim))
        bound = 1.0 / math.sqrt(latent_dim)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(
        self,
        z: Tensor,
        *,
        dtype: torch.dtype,
        seed: Tensor | int | None = None,
        slots: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Memory ``[layers, 2, batch, kv_heads, 1, head_dim]``; its key and value halves are one storage.

        out: a tensor of that shape to write instead.
        """
        vectors = nn.functional.linear(z.to(self.weight.dtype), self.weight)
        if self.training and self.dropout > 0.0:
            # latent_kv's own dropout, of one "layer" and "side", so that processes that share a batch drop what one would
            keep = keep_mask((1, 1, *vectors.shape), self.dropout, stream_tensor(seed, z.device)).view(vectors.shape)
            vectors = vectors * (keep / (1.0 - self.dropout)).to(vectors.dtype)
        vectors = vectors.to(dtype)
        vectors = vectors.view(-1, self.layers, self.kv_heads, self.head_dim).transpose(0, 1)
        memory = vectors[:, None, :, :, None].expand(-1, 2, -1, -1, -1, -1)
        return memory if out is None else out.copy_(memory)
