"""lm_head_loss: registration, autograd and the public function. The truth is reference.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..registration import autocast, define, primitives, refuse_vmap, tangents
from .checks import check_labels, check_lm_head_loss
from .chunked import Chunked, final, in_chunks, row_dtype, take, token_scale

# ---- primitive -----------------------------------------------------------------------------------------------------


def _fake_fwd(
    hidden, weight, labels, bias, token_weights, softcap, logit_scale, chunk, want_hidden, want_weight, want_bias
):
    acc = torch.promote_types(hidden.dtype, torch.float32)
    tokens, width, vocabulary = hidden.shape[0], hidden.shape[1], weight.shape[0]
    return (
        hidden.new_empty((), dtype=acc),
        hidden.new_empty((tokens,), dtype=acc),
        hidden.new_empty((tokens if want_hidden else 0, width), dtype=row_dtype(hidden.dtype)),
        hidden.new_empty((vocabulary if want_weight else 0, width), dtype=acc),
        hidden.new_empty((vocabulary if want_bias else 0,), dtype=acc),
    )


def _triton_fwd(*args):
    from .triton import lm_head_loss_fwd

    return lm_head_loss_fwd(*args)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, labels, bias, token_weights, *ctx.options = inputs
    ctx.dtype = hidden.dtype
    *_, want_weight, want_bias = ctx.options
    again = (
        (hidden, weight, labels, bias) if want_weight or want_bias else (None,) * 4
    )  # a frozen head needs its rows only
    ctx.save_for_backward(*again, token_weights, *output[1:])
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, dloss, dnll, *_unused) -> tuple:
    """Rows of jac are d nll_t / d hidden_t: any gradient of loss and nll is exact for hidden. The gradients of weight
    and bias were summed with the token weights known in forward; one that comes through nll has others."""
    nothing = (None,) * 6
    if dloss is None and dnll is None:
        return (None,) * 5 + nothing
    hidden, weight, labels, bias, token_weights, nll, jac, dweight, dbias = ctx.saved_tensors
    softcap, logit_scale, chunk, want_hidden, want_weight, want_bias = ctx.options
    scale = token_scale(dloss, dnll, token_weights, nll)
    dhidden = (jac * scale[:, None]).to(ctx.dtype) if want_hidden else None
    again = dnll is not None or getattr(ctx, "taken", False)
    if again and (want_weight or want_bias):
        run = ctx.primitives.lm_head_loss_fwd
        *_, dweight, dbias = run(
            hidden, weight, labels, bias, scale, softcap, logit_scale, chunk, False, want_weight, want_bias
        )
    factor = 1.0 if again else dloss
    dweight = take(ctx, dweight, factor).to(ctx.dtype) if want_weight else None
    dbias = take(ctx, dbias, factor).to(ctx.dtype) if want_bias else None
    dtoken = dloss * nll if ctx.needs_input_grad[4] and dloss is not None else None
    dhidden, dweight, dbias, dtoken = final((dhidden, dweight, dbias, dtoken), nll)
    return dhidden, dweight, None, dbias, dtoken, *nothing


define(
    "lm_head_loss_fwd(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? token_weights, float softcap, "
    "float logit_scale, int chunk, bool want_hidden, bool want_weight, bool want_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_fwd,
    triton=_triton_fwd,
    setup_context=_setup_context,
    backward=_backward,
)
backend.register(
    "lm_head_loss",
    cpp=backend.Support(backend.FLOATS_AND_DOUBLE, ("lm_head_loss_fwd",)),
    triton=backend.Support(backend.FLOATS, ("lm_head_loss_fwd",)),
)

# ---- the public function -------------------------------------------------------------------------------------------


def lm_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of a language-model head, without ever holding the logits of all tokens.

    logits = logit_scale * (hidden @ weight.T + bias), then softcap * tanh(logits / softcap) if a softcap is given;
    nll_t = logsumexp(logits_t) - logits_t[labels_t], and loss = sum_t token_weights_t * nll_t.

    Args:
        hidden: [T, H] final hidden states, fp32, fp16, bf16 or fp64.
        weight: [V, H] the head's matrix, in hidden's dtype.
        labels: int64 [T], target ids in [0, V), or -100: that token is ignored (nll 0, no gradient).
        bias: [V] or None, in hidden's dtype.
        token_weights: [T] or None (ones), any floating dtype.
        softcap: final soft cap > 0 (Gemma 2), or None.
        logit_scale: factor on the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        chunk: tokens whose logits exist at one time; None chooses.

    Returns:
        loss: scalar, in nats; nll: [T] per token, in nats. Both fp32 (fp64 for fp64 inputs).

    The gradient is made in forward, for those of hidden, weight and bias that require it: two matrix products when the
    head is frozen, three when it is trained. Rows of d nll_t / d hidden_t are kept unweighted, so a gradient that
    arrives through nll (alone, or beside the one through loss) is exact for hidden at no cost; for weight and bias it
    makes their gradient anew in backward (two more matrix products), so detach nll where it is only logged and the
    head is trained. token_weights gets its gradient too. Double backward raises. Forward-mode derivatives are plain
    torch's, over the same chunks.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together; on CPU also labels out of range.
            On CUDA there is no host synchronisation: such a label is caught on the device.
    """
    hidden, weight, bias = autocast(hidden.device.type, hidden, weight, bias)
    check_lm_head_loss(hidden, weight, labels, bias, token_weights, softcap, logit_scale, chunk)
    refuse_vmap("lm_head_loss", hidden, weight, labels, bias, token_weights)
    if token_weights is not None:
        token_weights = token_weights.to(torch.promote_types(hidden.dtype, torch.float32))
    grad = torch.is_grad_enabled()
    want = tuple(grad and x is not None and x.requires_grad for x in (hidden, weight, bias))
    cap = 0.0 if softcap is None else float(softcap)
    dual = tangents(hidden, weight, bias, token_weights)
    choice = backend.choose("lm_head_loss", hidden, **dual)
    if choice == "reference":
        if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
            check_labels(labels, weight.shape[0])
        options = (cap, float(logit_scale), chunk or (32 if hidden.device.type == "cpu" else 512))
        if dual:
            return in_chunks(hidden, weight, labels, bias, token_weights, options)
        return Chunked.apply(hidden, weight, labels, bias, token_weights, options, want)
    run = primitives(choice, hidden).lm_head_loss_fwd
    return run(hidden, weight, labels, bias, token_weights, cap, float(logit_scale), chunk or 0, *want)[:2]
