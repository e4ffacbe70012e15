"""lm_head_loss on CUDA: matrix products by cuBLAS over chunks of tokens, and between them one program per token that reads
its row of fp32 logits twice: once for the softmax's sums, once to write the gradient."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..launch import TRITON_TYPES, CompileCase, Config, launch
from ..triton_math import cast, exp_, log_unit, tanh_
from .chunked import row_dtype
from .reference import IGNORE_INDEX

# ---- device code -----------------------------------------------------------------------------------------------------
# Every sum belongs to one program and runs in one order: results are the same bits run after run.


@triton.jit
def _log1p(x):
    """ln(1 + x) for x >= 0: the series of 2 artanh(x / (2 + x)) below 1/2, with relative accuracy down to 0."""
    z = x / (x + 2.0)
    q = z * z
    p = q * (1.0 / 11.0) + 1.0 / 9.0
    p = p * q + 1.0 / 7.0
    p = p * q + 1.0 / 5.0
    p = p * q + 1.0 / 3.0
    small = 2.0 * z + 2.0 * z * q * p
    inverse = 1.0 / (1.0 + x)
    large = -log_unit(inverse)
    return tl.where(x < 0.5, small, tl.where(x == x, large, x))


@triton.jit
def _form(x, bias, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """The logit of a product."""
    if HAS_BIAS:
        x += bias
    x *= logit_scale
    if HAS_CAP:
        x = softcap * tanh_(x / softcap)
    return x


@triton.jit
def _slope(x, softcap):
    """d logit / d (scaled product), from the capped logit."""
    t = x / softcap
    return (1.0 - t) * (1.0 + t)


@triton.jit
def lm_head_loss_row_kernel(
    product, bias, labels, token_weights, nll, grad, weighted, lowered, lift, vocab, padded, softcap, logit_scale,
    stride_product, stride_grad, stride_weighted,
    IGNORE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, WANT_GRAD: tl.constexpr,
    WANT_WEIGHTED: tl.constexpr, LIFT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # Rows are `padded` long, a multiple of 64: masked by that, an access is one of 16 bytes. What lies behind the vocabulary is
    # read as it is and written as zero.
    # LIFT (fp16): a row of grad is stored times a power of two that brings it to size 1, and `lowered` has the inverse;
    # weighted is stored times `lift`, one for all. Small numbers would be lost before the loss scale comes.
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    inside = (label >= 0) & (label < vocab)
    counted = label != IGNORE
    base = product + row * stride_product
    minus_inf = float("-inf")
    lane = tl.arange(0, BLOCK_V)

    # The label is left out of the running sum, so that 1 - p(label) needs no difference of nearly equal numbers.
    top = tl.full((), minus_inf, tl.float32)
    others = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK_V):
        col = start + lane
        x = tl.load(base + col, mask=col < padded, other=0.0)
        b = tl.load(bias + col, mask=col < vocab, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
        x = _form(x, b, logit_scale, softcap, HAS_BIAS, HAS_CAP)
        x = tl.where((col < vocab) & (col != label), x, minus_inf)
        new = tl.maximum(top, tl.max(x, axis=0))
        shift = tl.where(new == minus_inf, 0.0, new)
        others = others * exp_(top - shift) + tl.sum(exp_(x - shift), axis=0)
        top = new

    at = tl.where(inside, label, 0)
    own_bias = tl.load(bias + at).to(tl.float32) if HAS_BIAS else 0.0
    own = _form(tl.load(base + at), own_bias, logit_scale, softcap, HAS_BIAS, HAS_CAP)
    most = tl.maximum(top, own)
    rest = tl.where((top == minus_inf) & (most != minus_inf), 0.0, others * exp_(top - most))
    total = rest + exp_(own - most)
    # rest and total lie in [0, vocab] and [1, vocab + 1]
    value = tl.where(own > top, _log1p(rest), (most - own) + _log1p(total - 1.0))
    value = tl.where(own == float("inf"), float("nan"), value)
    value = tl.where(inside, value, float("nan"))  # a label outside the vocabulary
    tl.store(nll + row, tl.where(counted, value, 0.0))

    if WANT_GRAD or WANT_WEIGHTED:
        token_weight = tl.load(token_weights + row) if WANT_WEIGHTED else 1.0
        broken = tl.where(value == value, 0.0, value)  # NaN in every gradient of a row whose nll is NaN
        factor = logit_scale / total + broken
        own_grad = -rest / total * logit_scale + broken
        if HAS_CAP:
            own_grad *= _slope(own, softcap)
        row_lift = 1.0
        if LIFT:
            # what is not the label adds up to this, and the label's own is as large
            size = tl.abs(rest / total * logit_scale)
            exponent = tl.minimum(tl.maximum((size.to(tl.int32, bitcast=True) >> 23) & 255, 1), 253)
            row_lift = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
            tl.store(lowered + row, (exponent << 23).to(tl.float32, bitcast=True))
            if WANT_WEIGHTED:
                token_weight *= tl.load(lift)
        for start in range(0, vocab, BLOCK_V):
            col = start + lane
            x = tl.load(base + col, mask=col < padded, other=0.0)
            b = tl.load(bias + col, mask=col < vocab, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
            x = _form(x, b, logit_scale, softcap, HAS_BIAS, HAS_CAP)
            g = exp_(x - most) * factor
            if HAS_CAP:
                g *= _slope(x, softcap)
            g = tl.where(col == label, own_grad, g)
            g = tl.where(counted & (col < vocab), g, 0.0)
            if WANT_GRAD:
                tl.store(grad + row * stride_grad + col, cast(g * row_lift, grad.dtype.element_ty), mask=col < padded)
            if WANT_WEIGHTED:
                g *= token_weight
                tl.store(weighted + row * stride_weighted + col, cast(g, weighted.dtype.element_ty), mask=col < padded)


@triton.jit
def lm_head_loss_bias_kernel(
    grad, dbias, tokens, vocab, stride_grad, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, tokens, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        ok = (row < tokens)[:, None] & (col < vocab)[None, :]
        g = tl.load(grad + row[:, None] * stride_grad + col[None, :], mask=ok, other=0.0).to(tl.float32)
        total += tl.sum(g, axis=0)
    before = tl.load(dbias + col, mask=col < vocab, other=0.0)
    tl.store(dbias + col, before + total, mask=col < vocab)


# ---- configurations and launchers ------------------------------------------------------------------------------------

_ROW = {1024: Config({"BLOCK_V": 1024}, num_warps=4), 4096: Config({"BLOCK_V": 4096}, num_warps=8)}
_BIAS = Config({"ROWS": 16, "BLOCK_V": 128}, num_warps=4)

# Bytes of fp32 logits that exist at one time. The frozen head is best served by chunks whose logits stay near the second
# level cache; each chunk of a trained head reads and writes all of d weight, so there are fewer and larger ones.
_LOGIT_BYTES, _LOGIT_BYTES_TRAINED = 128 << 20, 1 << 30


def default_chunk(tokens: int, vocab: int, trained: bool) -> int:
    """Tokens of a chunk: as many as the budget holds, a multiple of 128 (whole tiles for cuBLAS), at least 128."""
    fit = (_LOGIT_BYTES_TRAINED if trained else _LOGIT_BYTES) // (4 * vocab)
    return max(1, min(tokens, max(128, fit // 128 * 128)))


def padded_width(vocab: int) -> int:
    """Elements of a row of logits or of its gradient: whole 128-byte lines, so that accesses can be of 16 bytes."""
    return -(-vocab // 64) * 64


def _rows(count: int, vocab: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Room for rows of a vocabulary: [count, vocab] of rows that are `padded_width` apart."""
    return torch.empty((count, padded_width(vocab)), dtype=dtype, device=device)[:, :vocab]


def _product_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """out = a @ b in fp32, summed in fp32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)  # the interpreter's machine


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32, summed in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # the interpreter's machine


def lm_head_loss_fwd(
    hidden, weight, labels, bias, token_weights, softcap, logit_scale, chunk, want_hidden, want_weight, want_bias
):
    """The Triton form of lmvae_fast::lm_head_loss_fwd. No host synchronisation: a label outside the vocabulary gives NaN."""
    tokens, width = hidden.shape
    vocab = weight.shape[0]
    device = hidden.device
    chunk = chunk or default_chunk(tokens, vocab, want_weight)
    trained = want_weight or want_bias
    half = hidden.dtype == torch.float16
    weigh = trained and (half or token_weights is not None)
    labels = labels.contiguous()
    bias_row = hidden if bias is None else bias.contiguous()
    nll = torch.empty(tokens, dtype=torch.float32, device=device)
    token_row = nll if token_weights is None else token_weights.contiguous()
    lowered, lift = nll, nll
    if half:
        lowered = torch.ones(tokens, dtype=torch.float32, device=device)
        lift = torch.ones((), dtype=torch.float32, device=device)
        if trained and token_weights is None:
            token_row = torch.ones_like(nll)
        if trained and tokens:  # the largest entry comes to between 2^13 and 2^14, found on the device
            lift = torch.exp2(13 - (token_row.abs().amax() * abs(logit_scale)).clamp(1e-30, 1e30).log2().floor())
    config = _ROW[1024 if vocab <= 4096 else 4096]
    # Casts to half types are the kernel's; on the interpreter's machine torch's, as its own do not round to nearest.
    written = hidden.dtype if hidden.is_cuda else torch.float32

    jac = torch.empty((tokens if want_hidden else 0, width), dtype=row_dtype(hidden.dtype), device=device)
    rows_of_weight = vocab if want_weight and tokens == 0 else 0
    dweight = torch.zeros((rows_of_weight, width), dtype=torch.float32, device=device)
    dbias = torch.zeros(vocab if want_bias else 0, dtype=torch.float32, device=device)
    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        h = hidden[rows]
        count = h.shape[0]
        product = _product_into(_rows(count, vocab, torch.float32, device), h, weight.t())
        plain = want_hidden or (trained and not weigh)
        grad = product if written == torch.float32 or not plain else _rows(count, vocab, written, device)
        weighted = _rows(count, vocab, written, device) if weigh else grad
        launch(
            lm_head_loss_row_kernel, (count,), device, config,
            product, bias_row, labels[rows], token_row[rows], nll[rows], grad, weighted, lowered[rows], lift,
            vocab, padded_width(vocab), softcap, logit_scale, product.stride(0), grad.stride(0), weighted.stride(0),
            IGNORE=IGNORE_INDEX, HAS_BIAS=bias is not None, HAS_CAP=softcap > 0, WANT_GRAD=plain, WANT_WEIGHTED=weigh,
            LIFT=half,
        )  # fmt: skip
        if want_hidden and half:
            torch.mul(_product(grad.to(weight.dtype), weight), lowered[rows, None], out=jac[rows])
        elif want_hidden:
            torch.mm(grad.to(weight.dtype), weight, out=jac[rows])
        if want_weight:
            dlogits = weighted.to(h.dtype).t()
            if start == 0:
                dweight = _product(dlogits, h)  # no zeros to add it to: they would be a second copy
            elif h.dtype == torch.float32:
                dweight.addmm_(dlogits, h)
            else:
                dweight += _product(dlogits, h)
        if want_bias:
            launch(
                lm_head_loss_bias_kernel, (triton.cdiv(vocab, _BIAS.constants["BLOCK_V"]),), device, _BIAS,
                weighted, dbias, count, vocab, weighted.stride(0),
            )  # fmt: skip
    if half and trained:
        dweight, dbias = dweight.div_(lift), dbias.div_(lift)
    loss = nll.sum() if token_weights is None else (nll * token_weights).sum()
    return loss, nll, jac, dweight, dbias


# ---- compile gate ----------------------------------------------------------------------------------------------------


def _cases() -> list[CompileCase]:
    cases = []
    for dtype in TRITON_TYPES.values():
        row = {
            "product": "*fp32", "bias": f"*{dtype}", "labels": "*i64", "token_weights": "*fp32", "nll": "*fp32",
            "grad": f"*{dtype}", "weighted": f"*{dtype}", "lowered": "*fp32", "lift": "*fp32",
            "vocab": "i32", "padded": "i32", "softcap": "fp32", "logit_scale": "fp32",
            "stride_product": "i32", "stride_grad": "i32", "stride_weighted": "i32",
        }  # fmt: skip
        kinds = {  # has bias, has softcap, wants the gradient, wants the weighted one
            "frozen": (False, False, True, False), "bias": (True, False, True, True), "cap": (False, True, True, True),
            "trained": (False, False, True, True), "eval": (False, False, False, False),
        }  # fmt: skip
        for block, config in _ROW.items():
            for tag, flags in kinds.items():
                constants = dict(zip(("HAS_BIAS", "HAS_CAP", "WANT_GRAD", "WANT_WEIGHTED"), flags, strict=True))
                constants.update(IGNORE=IGNORE_INDEX, LIFT=dtype == "fp16")
                name, wide = f"row-{dtype}-{block}-{tag}", not constants["HAS_BIAS"]
                rows = ("padded", "stride_product", "stride_grad", "stride_weighted")
                case = CompileCase(name, lm_head_loss_row_kernel, row, config, constants, max_registers=128)
                cases.append(replace(case, multiples=rows, wide_loads=wide))
        column = {"grad": f"*{dtype}", "dbias": "*fp32", "tokens": "i32", "vocab": "i32", "stride_grad": "i32"}
        cases.append(CompileCase(f"bias-{dtype}", lm_head_loss_bias_kernel, column, _BIAS))
    return cases


COMPILE_CASES = _cases()
