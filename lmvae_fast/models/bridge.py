"""From vectors of one width to another, before a flow: a flow keeps the number of channels, word vectors and latents do not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmvae_fast.errors import ConfigError, DataError


class Bridge(nn.Module):
    """A fixed map from word vectors ``[N, dim_in]`` to a flow's input ``[N, dim_out]``.

    ``none``: the vectors themselves, of equal width. ``pca``: of wider ones, their coordinates along the dim_out leading
    principal components of the words it was fitted on. ``pad``: narrower ones with more columns behind; zeros, and noise
    while a flow is being fitted. A flow's log-determinant could otherwise grow without bound along columns that are
    always zero, and its likelihood with it (Ardizzone et al., arXiv 1808.04730, pad with noise for the same reason).

    Args:
        kind: ``none``, ``pca`` or ``pad``.
        dim_in, dim_out: widths.
        noise: standard deviation of what pads while fitting.

    ``explained``: the share of the vectors' variance that passes, below 1 for ``pca`` alone.
    """

    mean: Tensor
    matrix: Tensor
    explained: Tensor

    def __init__(self, kind: str, dim_in: int, dim_out: int, *, noise: float = 0.1):
        super().__init__()
        self.kind, self.dim_in, self.dim_out, self.noise = kind, dim_in, dim_out, noise
        rows = dim_in if kind == "pca" else 0
        self.register_buffer("mean", torch.zeros(rows))
        self.register_buffer("explained", torch.tensor(1.0))
        self.register_buffer("matrix", torch.zeros(rows, dim_out if rows else 0))

    @classmethod
    def of_kind(cls, kind: str, dim_in: int, dim_out: int, *, noise: float = 0.1) -> Bridge:
        """The bridge for these widths; ``auto`` chooses. Raises ConfigError where the kind asked for does not fit."""
        fitting = "none" if dim_in == dim_out else "pca" if dim_in > dim_out else "pad"
        if kind not in ("auto", fitting):
            raise ConfigError(
                f"word vectors of width {dim_in} do not reach latents of width {dim_out} by bridge={kind!r}",
                value=f"{dim_in} and {dim_out}",
                limit={"none": "equal widths", "pca": "wider word vectors", "pad": "narrower word vectors"}[kind],
                remedy=f"set bridge={fitting!r} or 'auto', or train a VAE with latent_dim={dim_in}",
            )
        return cls(fitting, dim_in, dim_out, noise=noise)

    @torch.no_grad()
    def fit(self, vectors: Tensor) -> None:
        """Find the principal components of vectors ``[N, dim_in]``, in float64; their signs are fixed.

        Raises DataError when the vectors span fewer dimensions than the latents have.
        """
        if self.kind != "pca":
            return
        x = vectors.double()
        mean = x.mean(0)
        values, components = torch.linalg.eigh((x - mean).t() @ (x - mean) / max(len(x) - 1, 1))
        values, components = values.flip(0), components.flip(1)
        floor = values[0] * self.dim_in * torch.finfo(torch.float64).eps
        rank = int((values > floor).sum())
        if rank < self.dim_out:
            raise DataError(
                "the word vectors span fewer dimensions than the latents have", value=f"{rank} of {len(x)} vectors",
                limit=f">= {self.dim_out}", remedy="give more words, or a VAE with a smaller latent_dim",
            )  # fmt: skip
        components = components[:, : self.dim_out]
        largest = components.abs().argmax(0)
        components = components * components.gather(0, largest[None]).sign()  # an eigenvector's sign is arbitrary
        self.mean.copy_(mean)
        self.matrix.copy_(components)
        self.explained.copy_(values[: self.dim_out].sum() / values.sum())

    def forward(self, vectors: Tensor, noise: Tensor | None = None) -> Tensor:
        """``[N, dim_out]`` of vectors ``[N, dim_in]``; noise N(0, 1) ``[N, dim_out - dim_in]`` for what pads, or None."""
        if self.kind == "pca":
            return (vectors - self.mean) @ self.matrix
        if self.kind == "pad":
            more = vectors.new_zeros(len(vectors), self.dim_out - self.dim_in) if noise is None else self.noise * noise
            return torch.cat([vectors, more.to(vectors)], dim=1)
        return vectors

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.dim_in} to {self.dim_out}"
