"""lm_head_loss: registration, autograd and the public function."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import chunked
from .reference import IGNORE_INDEX

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _LmHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, token_weights, softcap, logit_scale, chunk):
        need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        nll, jac, dweight, dbias = chunked.forward(
            hidden, weight, labels, bias, token_weights, softcap, logit_scale, need, chunk
        )
        loss = nll.sum() if token_weights is None else (nll * token_weights).sum()
        ctx.save_for_backward(hidden, weight, labels, bias, token_weights, nll, jac, dweight, dbias)
        ctx.settings, ctx.need = (softcap, logit_scale, chunk), need
        ctx.set_materialize_grads(False)
        return loss, nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, grad_nll):
        hidden, weight, labels, bias, token_weights, nll, jac, dweight, dbias = ctx.saved_tensors
        softcap, logit_scale, chunk = ctx.settings
        if grad_loss is None and grad_nll is None:
            return (None,) * 8
        dtoken = None
        if grad_loss is None:
            row_scale = grad_nll
        else:
            row_scale = grad_loss.expand_as(nll) if token_weights is None else grad_loss * token_weights
            row_scale = row_scale if grad_nll is None else row_scale + grad_nll
            if ctx.needs_input_grad[4]:
                dtoken = grad_loss * nll
        dhidden = None if jac is None else (jac * row_scale[:, None]).to(hidden.dtype)
        if dweight is not None or dbias is not None:
            if grad_nll is not None:  # the weighting known in forward was not the one that came back: make them anew
                need = (False, dweight is not None, dbias is not None)
                _, _, dweight, dbias = chunked.forward(
                    hidden, weight, labels, bias, row_scale, softcap, logit_scale, need, chunk
                )
                scale = 1.0
            else:
                scale = grad_loss
            dweight = None if dweight is None else (dweight * scale).to(weight.dtype)
            dbias = None if dbias is None else (dbias * scale).to(bias.dtype)
        return dhidden, dweight, None, dbias, dtoken, None, None, None


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
    head is trained. token_weights gets its gradient too. Double backward raises.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together; on CPU also labels out of range.
            On CUDA there is no host synchronisation: such a label is caught on the device.
    """
    _check(hidden, weight, labels, bias, token_weights, softcap, chunk)
    if token_weights is not None:
        token_weights = token_weights.to(torch.promote_types(hidden.dtype, torch.float32))
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_labels(labels, weight.shape[0])
    if chunk is None:
        chunk = 32 if hidden.device.type == "cpu" else 512
    return _LmHeadLoss.apply(
        hidden, weight, labels, bias, token_weights,
        None if softcap is None else float(softcap), float(logit_scale), chunk,
    )  # fmt: skip


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    bad = ((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= vocabulary)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"lm_head_loss: labels[{at}] is {int(labels[at])}, outside the vocabulary [0, {vocabulary}) "
            f"(weight has {vocabulary} rows; only {IGNORE_INDEX} is ignored)"
        )


def _check(hidden, weight, labels, bias, token_weights, softcap, chunk) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"lm_head_loss: hidden must be [tokens, width], got shape {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"lm_head_loss: weight must be [vocabulary, {hidden.shape[1]}] as hidden is {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError("lm_head_loss: weight has an empty vocabulary (0 rows)")
    if hidden.dtype not in _FLOATS:
        raise TypeError(f"lm_head_loss: hidden must be fp32, fp16, bf16 or fp64, got {hidden.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"lm_head_loss: labels must be int64, got {labels.dtype}")
    for name, value, shape in (
        ("labels", labels, (hidden.shape[0],)),
        ("bias", bias, (weight.shape[0],)),
        ("token_weights", token_weights, (hidden.shape[0],)),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"lm_head_loss: {name} must have shape {shape} (hidden {tuple(hidden.shape)}, weight "
                f"{tuple(weight.shape)}), got {tuple(value.shape)}"
            )
    for name, value in (("weight", weight), ("labels", labels), ("bias", bias), ("token_weights", token_weights)):
        if value is None:
            continue
        if value.device != hidden.device:
            raise ValueError(f"lm_head_loss: {name} is on {value.device}, hidden on {hidden.device}")
        if name in ("weight", "bias") and value.dtype != hidden.dtype:
            raise TypeError(f"lm_head_loss: {name} is {value.dtype}, hidden is {hidden.dtype}")
        if name == "token_weights" and not value.dtype.is_floating_point:
            raise TypeError(f"lm_head_loss: token_weights must be floating, got {value.dtype}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"lm_head_loss: softcap must be > 0 or None, got {softcap}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"lm_head_loss: chunk must be >= 1 token, got {chunk}")
