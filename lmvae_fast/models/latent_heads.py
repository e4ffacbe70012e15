"""Ways of a latent into a decoder beside memory, and a check on what it says by itself.

Skip, G-Skip, Embedding and bag of words of CVAE with G-Skip (IEEE TAI 7(2), 2026; behaviour of zhangjf-nlp/LLM-based-CVAE).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmvae_fast.kernels.lm_head_loss import lm_head_loss


class SkipHead(nn.Module):
    """What is added to the final hidden state: the mean over samples of a small network of z.

    Args:
        latent_dim, hidden: widths of input and output.
        kind: ``skip``: the mean; ``gskip``: its gradient alone, the value being 0; ``-linear`` behind either: one linear map
            instead of the network with its norm.
        activation, norm_weight, eps: of the network: SiLU and a norm ``rms`` with a weight, or GELU and a norm ``layer``
            without one (the older form on GPT-2).
    """

    def __init__(
        self, latent_dim: int, hidden: int, *, kind: str, activation: str = "silu", norm: str = "rms", eps: float = 1e-6
    ):
        super().__init__()
        self.gradient_only = kind.startswith("gskip")
        self.norm, self.eps = norm, eps
        self.net = nn.Sequential(nn.Linear(latent_dim, hidden))
        self.norm_weight = None
        if not kind.endswith("linear"):
            self.net.append(_ACTIVATIONS[activation]()).append(nn.Linear(hidden, hidden))
            if norm == "rms":
                self.norm_weight = nn.Parameter(torch.ones(hidden))

    def mean(self, z: Tensor) -> Tensor:
        """The mean ``[batch, hidden]`` over samples z ``[samples, batch, latent_dim]``."""
        states = self.net(z.to(next(self.net.parameters()).dtype))
        if len(self.net) > 1:
            normed = nn.functional.rms_norm if self.norm == "rms" else nn.functional.layer_norm
            states = normed(states, states.shape[-1:], eps=self.eps)
        states = states.mean(0)  # the weight is the same for all samples
        return states if self.norm_weight is None else states * self.norm_weight

    def forward(self, z: Tensor) -> Tensor | None:
        """The residual ``[batch, hidden]`` of samples ``[samples, batch, latent_dim]``; None where it would be exactly 0 and
        no gradient is wanted."""
        if not self.gradient_only:
            return self.mean(z)
        if not torch.is_grad_enabled():
            return None
        mean = self.mean(z)
        return mean - mean.detach()


class EmbeddingHead(nn.Module):
    """What is added to every token embedding ``[batch, hidden]``: a small network of z ``[batch, latent_dim]``."""

    def __init__(self, latent_dim: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(latent_dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        return self.net(z.to(next(self.net.parameters()).dtype))


class BagOfWordsHead(nn.Module):
    """The likelihood of words under latents alone, without a decoder.

    Args:
        latent_dim: of a latent.
        head_weight: of the decoder's head, ``[vocabulary, hidden]``, which this head's begins as a copy of.
    """

    def __init__(self, latent_dim: int, head_weight: Tensor):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(latent_dim, head_weight.shape[1]), nn.SiLU())
        self.weight = nn.Parameter(
            head_weight.detach().to(torch.promote_types(head_weight.dtype, torch.float32), copy=True)
        )

    def forward(self, z: Tensor, words: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of negative log-likelihoods of words int64 ``[K]``, each under its own latent ``[K, latent_dim]``."""
        hidden = self.net(z.to(next(self.net.parameters()).dtype))
        return lm_head_loss(hidden.to(self.weight.dtype), self.weight, words, token_weights=weights)[0]


_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU}
