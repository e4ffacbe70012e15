"""What the tokens of a batch cost a decoder that reads them in one parallel pass under an injection."""

from __future__ import annotations

from torch import Tensor

from lmvae_fast.kernels.lm_head_loss import lm_head_loss
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.injection import Injection
from lmvae_fast.text.batch import Batch


def token_losses(
    decoder: Decoder, batch: Batch, read: Tensor, injection: Injection | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weighted sum of token losses (scalar) and the NLL of each token ``[T]``, in nats, the decoder reading ``read`` ``[T]``.

    weights: of each token ``[T]``, or None for ones.
    """
    hidden = decoder.hidden(
        read,
        injection,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        rows=batch.rows,
        token_index=batch.token_index,
    )
    weight, labels = decoder.head_weight, batch.labels
    if batch.targets is not None:  # of a prompt nothing is predicted, so no logit is made
        hidden, labels = hidden.index_select(0, batch.targets), labels[batch.targets]
        weights = None if weights is None else weights[batch.targets]
    loss, nll = lm_head_loss(
        hidden.to(weight.dtype),
        weight,
        labels,
        bias=decoder.head_bias,
        token_weights=weights,
        softcap=decoder.softcap,
        logit_scale=decoder.logit_scale,
    )
    if batch.targets is not None:
        nll = nll.new_zeros(batch.num_tokens).index_copy(0, batch.targets, nll)
    return loss, nll
