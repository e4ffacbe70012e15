"""What the tokens of a batch cost a decoder that reads them in one parallel pass under an injection."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.kernels.lm_head_loss import lm_head_loss
from lmvae_fast.kernels.registration import tangents
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.decoder.exchange import called
from lmvae_fast.models.decoder.training_body import TrainingBody
from lmvae_fast.models.decoder.walk import parameters_of
from lmvae_fast.models.injection import Injection
from lmvae_fast.text.batch import Batch

#: Tokens, in fp32, that go through a prepared decoder at a time in a training step on a CPU: what its layers keep for their
#: gradients is of so many. Of half types it is twice as many, which take as much memory: each piece reads all weights again.
PIECE = 320


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


def token_losses_in_pieces(
    decoder: Decoder, batch: Batch, read: Tensor, injection: Injection, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """As `token_losses`, NLL without a graph: where a run's frozen decoder goes through prepared layers on a CPU, a few
    sentences at a time, whose gradients by the injection are made at once.

    No sentence reads another one's slots or tokens, so that nothing is computed twice, and memory is that of the largest piece.
    """
    bounds = _pieces(decoder, batch, injection)
    if len(bounds) < 3:
        loss, nll = token_losses(decoder, batch, read, injection, weights)
        return loss, nll.detach()
    parts = injection.memory, injection.embedding_shift, injection.output_residual
    return _InPieces.apply(decoder, batch, read, weights, bounds, injection.visibility, *parts)


def _pieces(decoder: Decoder, batch: Batch, injection: Injection) -> list[int]:
    """Sentences that pieces begin with, and the number of sentences."""
    whole = [0, batch.batch_size]
    stand_in = called(decoder.body) if hasattr(decoder, "body") else None
    if type(stand_in) is not TrainingBody:
        return whole
    tokens = PIECE * 4 // decoder.dtype.itemsize
    parts = [
        part for part in (injection.memory, injection.embedding_shift, injection.output_residual) if part is not None
    ]
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or not any(part.requires_grad for part in parts)
        # gradients in fp16 need the scale that the loss is multiplied with first
        or any(part.device.type != "cpu" or part.dtype == torch.float16 or tangents(part) for part in parts)
        or any(parameter.requires_grad for parameter in parameters_of(decoder))
        or batch.num_tokens < 2 * tokens
        or not stand_in.prepared()
    ):
        return whole
    return piece_bounds(batch.cu_seqlens.tolist(), tokens)


def piece_bounds(offsets: list[int], tokens: int) -> list[int]:
    """Cuts sentences with these offsets into consecutive pieces of about so many tokens, or more: the sentences that pieces
    begin with, and the number of sentences."""
    count = max(1, offsets[-1] // tokens)
    ends = offsets[1:]
    found = {0}
    for piece in range(1, count):  # the end of a sentence that lies nearest to where pieces of one size would end
        goal = piece * offsets[-1] / count
        found.add(1 + min(range(len(ends)), key=lambda sentence: abs(ends[sentence] - goal)))
    return sorted(found | {len(ends)})


def piece_of(batch: Batch, first: int, last: int, tokens: slice) -> Batch:
    """What the decoder is told of sentences [first, last), whose tokens these are."""
    offsets = batch.cu_seqlens[first : last + 1] - tokens.start
    targets = None
    if batch.targets is not None:
        targets = batch.targets[(batch.targets >= tokens.start) & (batch.targets < tokens.stop)] - tokens.start
    names = ("input_ids", "labels", "token_index")
    cut: dict[str, Any] = {name: getattr(batch, name)[tokens] for name in names}
    cut |= {"rows": batch.rows[tokens] - first, "tokens": batch.tokens[first:last], "targets": targets}
    cut |= {"max_seqlen": int(offsets.diff().max()), "cu_seqlens": offsets}
    return dataclasses.replace(batch, **cut)


class _InPieces(torch.autograd.Function):
    """Loss and NLL of a batch, piece by piece; forward makes the gradients by memory, shift and residual, too."""

    @staticmethod
    def forward(
        ctx: Any, decoder: Decoder, batch: Batch, read: Tensor, weights: Tensor, bounds: list[int], visibility: str,
        *parts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        wanted = [part is not None and part.requires_grad for part in parts]
        whole = Injection(visibility, *parts).detach()
        offsets = batch.cu_seqlens.tolist()
        grads: list[list[Tensor]] = []
        losses, nlls = [], []
        for first, last in itertools.pairwise(bounds):
            tokens = slice(offsets[first], offsets[last])
            piece = piece_of(batch, first, last, tokens)
            injection = whole.select(slice(first, last))
            pieces = (injection.memory, injection.embedding_shift, injection.output_residual)
            leaves = [
                part.detach().requires_grad_()
                for part, asked in zip(pieces, wanted, strict=True)
                if part is not None and asked
            ]
            with torch.enable_grad():
                loss, nll = token_losses(
                    decoder, piece, read[tokens], injection_of(injection, leaves, wanted), weights[tokens]
                )
            grads.append(list(torch.autograd.grad(loss, leaves)))
            losses.append(loss.detach())
            nlls.append(nll.detach())
        ctx.wanted = wanted
        memory = wanted[0]
        found = [
            torch.cat(of_part, dim=2 if memory and place == 0 else 0)
            for place, of_part in enumerate(zip(*grads, strict=True))
        ]
        ctx.save_for_backward(*found)
        nll = torch.cat(nlls)
        ctx.mark_non_differentiable(nll)
        return torch.stack(losses).sum(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (6 + len(ctx.wanted))
        found = iter(ctx.saved_tensors)
        return (*(None,) * 6, *(next(found) * grad if asked else None for asked in ctx.wanted))


def injection_of(injection: Injection, leaves: list[Tensor], wanted: list[bool]) -> Injection:
    """The injection with leaves in the place of the parts that are wanted."""
    own, parts = iter(leaves), (injection.memory, injection.embedding_shift, injection.output_residual)
    return Injection(
        injection.visibility, *(next(own) if asked else part for part, asked in zip(parts, wanted, strict=True))
    )
