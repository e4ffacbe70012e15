"""The algorithm in plain torch: chunks of tokens, the gradient made while a chunk's logits exist.

What the backend `reference` runs: everywhere torch runs, on any device, with neither the C++ extension nor Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import IGNORE_INDEX

Options = tuple[float, float, int]  # softcap (0: none), logit_scale, chunk


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the rows d nll / d hidden while they wait for the gradient of the loss, for hidden of this dtype.

    A loss scale comes with that gradient only: until then fp16 would lose what is small.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    options: Options,
    want: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One pass over the tokens.

    `want` says which of (hidden, weight, bias) get a gradient. Returns loss; nll [T]; the rows d nll_t / d hidden_t
    [T, H] of `row_dtype`, *not* weighted; and d loss / d weight [V, H], d loss / d bias [V] in the accumulation type.
    """
    softcap, logit_scale, chunk = options
    acc = torch.promote_types(hidden.dtype, torch.float32)
    want_hidden, want_weight, want_bias = want
    tokens = hidden.shape[0]
    # torch's bf16 product on CPU reads past the rows of strided operands, and what lies there can be NaN (seen in 2.13)
    hidden, weight = hidden.contiguous(), weight.contiguous()
    nll = hidden.new_zeros(tokens, dtype=acc)
    jac = hidden.new_empty(hidden.shape, dtype=row_dtype(hidden.dtype)) if want_hidden else None
    dweight = torch.zeros_like(weight, dtype=acc, memory_format=torch.contiguous_format) if want_weight else None
    dbias = weight.new_zeros(weight.shape[0], dtype=acc) if want_bias else None

    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        h, valid = hidden[rows], labels[rows] != IGNORE_INDEX
        target = labels[rows].where(valid, 0)[:, None]
        logits = h @ weight.T if bias is None else torch.addmm(bias, h, weight.T)
        logits = logits.to(acc)
        if logit_scale != 1.0:
            logits = logits.mul_(logit_scale)
        slope = None
        if softcap > 0:
            logits = logits.div_(softcap).tanh_()
            slope = 1 - logits * logits
            logits.mul_(softcap)
        log_p = torch.log_softmax(logits, dim=1)
        nll[rows] = -log_p.gather(1, target).squeeze(1).where(valid, 0)
        if not any(want):
            continue
        grad = log_p.exp_()  # softmax - onehot, zero where ignored
        grad.scatter_add_(1, target, grad.new_full((1, 1), -1.0).expand_as(target))
        grad = grad.where(valid[:, None], 0)
        if slope is not None:
            grad.mul_(slope)
        if jac is not None and hidden.dtype == torch.float16:  # rows of size 1, so that small ones do not vanish
            size = grad.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(acc).tiny)
            jac[rows] = ((grad / size).to(weight.dtype) @ weight).to(acc) * (size * logit_scale)
        elif jac is not None:
            jac[rows] = (grad.to(weight.dtype) @ weight).mul_(logit_scale)
        if dweight is not None or dbias is not None:
            if token_weights is not None:
                grad.mul_(token_weights[rows, None])
            if dbias is not None:
                dbias.add_(grad.sum(0), alpha=logit_scale)
            if dweight is not None:
                dweight.addmm_(grad.T, h.to(acc), alpha=logit_scale)
    loss = nll.sum() if token_weights is None else (nll * token_weights).sum()
    return loss, nll, jac, dweight, dbias


def in_chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """(loss, nll) by torch's own operators, chunk by chunk: what forward-mode AD goes through."""
    softcap, logit_scale, chunk = options
    form: dict[str, Any] = {"bias": bias, "softcap": softcap or None, "logit_scale": logit_scale}
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    nll = torch.cat([reference.lm_head_loss(rows, weight, some, **form)[1] for rows, some in parts])
    return (nll if token_weights is None else nll * token_weights).sum(), nll


def token_scale(dloss: Tensor | None, dnll: Tensor | None, token_weights: Tensor | None, nll: Tensor) -> Tensor:
    """[T]: what nll_t counts for in what is differentiated, from the gradients of loss and nll (one may be None)."""
    if dloss is None:
        return dnll
    scale = dloss.expand_as(nll) if token_weights is None else dloss * token_weights
    return scale if dnll is None else scale + dnll


def take(ctx: Any, gradient: Tensor | None, factor: Tensor | float) -> Tensor | None:
    """A gradient that forward made, times `factor`: in its own memory, which is what the caller gets.

    The gradient of a head's weight is as large as the weight: a second copy of it would be the largest tensor of a step.
    `ctx.taken` then says that what forward made is gone, and a second backward over the same graph makes it anew. While a
    graph is being traced or transformed the product is a tensor of its own.
    """
    if gradient is None or isinstance(factor, float):
        return gradient  # made just now, with the factor in it
    if type(gradient) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(gradient):
        return gradient * factor
    ctx.taken = True
    # .data: the graph that saved this tensor is not to notice that it changes; nothing reads it there again
    return gradient.data.mul_(factor)


class _Final(torch.autograd.Function):
    """A gradient made in forward: it depends on `anchor` in a way autograd cannot know, so its derivative is refused."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor):
        raise RuntimeError("lm_head_loss: its gradient is made in forward and cannot be differentiated again")


def final(gradients: tuple[Tensor | None, ...], anchor: Tensor) -> tuple[Tensor | None, ...]:
    """`gradients`, and where backward itself is being recorded (create_graph) ones that refuse to be differentiated.

    anchor: an output of the op, which therefore has a gradient."""
    if not torch.is_grad_enabled():
        return gradients
    return tuple(g if g is None else _Final.apply(g.detach(), anchor) for g in gradients)


class Chunked(torch.autograd.Function):
    """(hidden, weight, labels, bias, token_weights, options, want) -> (loss, nll)."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, labels, bias, token_weights, options, want):
        loss, nll, jac, dweight, dbias = forward(hidden, weight, labels, bias, token_weights, options, want)
        again = (
            (hidden, weight, labels, bias) if want[1] or want[2] else (None,) * 4
        )  # a frozen head needs its rows only
        ctx.save_for_backward(*again, token_weights, nll, jac, dweight, dbias)
        ctx.options, ctx.dtype = options, hidden.dtype
        ctx.set_materialize_grads(False)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, dnll: Tensor | None):
        hidden, weight, labels, bias, token_weights, nll, jac, dweight, dbias = ctx.saved_tensors
        if dloss is None and dnll is None:
            return (None,) * 7
        scale = token_scale(dloss, dnll, token_weights, nll)
        dhidden = None if jac is None else (jac * scale[:, None]).to(ctx.dtype)
        again = dnll is not None or getattr(ctx, "taken", False)
        if again and (dweight is not None or dbias is not None):
            want = (False, dweight is not None, dbias is not None)
            *_, dweight, dbias = forward(hidden, weight, labels, bias, scale, ctx.options, want)
        factor = 1.0 if again else dloss
        if dweight is not None:
            dweight = take(ctx, dweight, factor).to(ctx.dtype)
        if dbias is not None:
            dbias = take(ctx, dbias, factor).to(ctx.dtype)
        dtoken = dloss * nll if ctx.needs_input_grad[4] and dloss is not None else None
        dhidden, dweight, dbias, dtoken = final((dhidden, dweight, dbias, dtoken), nll)
        return dhidden, dweight, None, dbias, dtoken, None, None
