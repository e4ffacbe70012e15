"""A decoder that really computes in fp64.

``model.double()`` is not enough: Hugging Face's RMSNorm and eager attention cast to fp32 inside, which leaves errors of
1e-7 in a model whose weights are all fp64. An oracle for 1e-12 needs those two computed in the model's own dtype.
Rotary angles stay in fp32 as the models have them: they depend on the position alone and are the same on every path.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from lmvae_fast.errors import UnsupportedDecoderError

ATTENTION = "lmvae_fast_reference"
Model = TypeVar("Model", bound=PreTrainedModel)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention by its formula, in the dtype of its inputs (at least fp32).

    query [B, H, Sq, D], key and value [B, Hkv, Sk, D], additive mask [B, 1, Sq, Sk] -> [B, Sq, H, D], weights.
    """
    if kwargs.get("s_aux") is not None:
        raise UnsupportedDecoderError("attention sinks (s_aux) are not honoured", value=type(module).__name__)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(ATTENTION, plain_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


class PlainRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (weight + offset) in the dtype of x; offset is 1 for the Gemma family."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float):
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (self.weight + self.offset)


def _plain_norm(norm: Any) -> PlainRMSNorm:
    """The same norm without the cast, proved on a sample: weight or 1 + weight, whichever the original computes."""
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    x = torch.randn(4, norm.weight.shape[-1], dtype=norm.weight.dtype, device=norm.weight.device)
    want = norm(x)
    for offset in (0.0, 1.0):
        plain = PlainRMSNorm(norm.weight, eps, offset)
        if torch.allclose(plain(x), want, rtol=1e-5, atol=1e-6):
            return plain
    raise UnsupportedDecoderError("a norm of this kind has no fp64 form here", value=type(norm).__name__)


def double_precision(model: Model) -> Model:
    """A copy of the model in fp64 that computes in fp64 throughout, with :func:`plain_attention` as its attention.

    Raises:
        UnsupportedDecoderError: the model has an RMSNorm that is neither ``weight`` nor ``1 + weight`` times x / rms.
    """
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation(ATTENTION)
    with torch.no_grad():
        for parent in list(twin.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__.endswith("RMSNorm") and not isinstance(child, PlainRMSNorm):
                    setattr(parent, name, _plain_norm(child))
    return twin
