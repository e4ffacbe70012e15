"""lm_head_loss against full logits: values, gradients by every route, layouts, special values, bad input, memory."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from lmvae_fast.kernels.backend import backend
from lmvae_fast.kernels.lm_head_loss import lm_head_loss, reference

from .common import (
    LAYOUTS,
    ODD_SIZES,
    GuardedAllocations,
    assert_op_within_error_rule,
    lay_out,
    on_backend,
    require,
    run_with_grads,
)

EVERY = ("reference", "cpp", "triton")
FAST = ("cpp", "triton")
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(tokens, width, vocab, dtype=torch.float32, scale=2.0, ignored=True):
    """hidden, weight, bias, token_weights, labels; logits of standard deviation `scale`."""
    hidden, weight = torch.randn(tokens, width) * scale, torch.randn(vocab, width) / math.sqrt(max(1, width))
    bias, token_weights = torch.randn(vocab), torch.rand(tokens) + 0.1
    labels = torch.randint(0, vocab, (tokens,))
    if ignored and tokens > 2:
        labels[tokens // 2] = -100
    return [hidden.to(dtype), weight.to(dtype), bias.to(dtype), token_weights, labels]


def call(function):
    """The op with its tensors as positional arguments, as the shared checks want them."""

    def run(hidden, weight, bias, token_weights, labels, **kwargs):
        return function(hidden, weight, labels, bias=bias, token_weights=token_weights, **kwargs)

    return run


def check(name, arguments, chunk=None, **kwargs):
    op = on_backend(call(functools.partial(lm_head_loss, chunk=chunk)), name)
    plain = call(reference.lm_head_loss)
    names = ("hidden", "weight", "bias", "token_weights")
    assert_op_within_error_rule(op, plain, arguments, ("loss", "nll"), names, **kwargs)


# ---- the reference itself ----------------------------------------------------------------------------------------------


def test_reference_against_sums_written_out():
    hidden, weight, bias, token_weights, labels = inputs(4, 3, 5, torch.float64)
    token_weights = token_weights.double()
    loss, nll = reference.lm_head_loss(
        hidden, weight, labels, bias=bias, token_weights=token_weights, softcap=3.0, logit_scale=0.5
    )
    expected = []
    for t in range(4):
        logits = [0.5 * (sum(hidden[t, k] * weight[v, k] for k in range(3)) + bias[v]) for v in range(5)]
        logits = [3.0 * math.tanh(x / 3.0) for x in logits]
        y = int(labels[t])
        expected.append(0.0 if y == -100 else math.log(sum(math.exp(x) for x in logits)) - logits[y])
    assert nll.tolist() == pytest.approx(expected, rel=1e-12)
    assert loss.item() == pytest.approx(sum(w * n for w, n in zip(token_weights.tolist(), expected, strict=True)))


# ---- the error rule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("size", ODD_SIZES)
def test_error_rule_at_odd_sizes(name, dtype, size):
    require("lm_head_loss", name, dtype)
    check(name, inputs(19, size, 131, dtype))
    check(name, inputs(19, 33, size, dtype))
    if name == "cpp" or size <= 31:  # the interpreter takes one token at a time
        check(name, inputs(size, 40, 131, dtype))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.37])
def test_error_rule_with_softcap_and_scale(name, dtype, softcap, logit_scale):
    require("lm_head_loss", name, dtype)
    check(name, inputs(37, 48, 301, dtype), softcap=softcap, logit_scale=logit_scale)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_error_rule_over_several_blocks_and_groups(dtype):
    """More tokens than a group (512), a vocabulary of several ranges and blocks, a width that is no multiple of 32."""
    require("lm_head_loss", "cpp", dtype)
    check("cpp", inputs(530, 36, 2053, dtype))


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_chunks_change_nothing_but_rounding(name, chunk):
    require("lm_head_loss", name)
    check(name, inputs(17, 20, 90), chunk=chunk)


@pytest.mark.parametrize("name", FAST)
def test_a_token_that_is_nearly_certain(name):
    """1 - p(label) from 1e-2 down to 1e-9: the gradient is that small number, not a rounding error."""
    require("lm_head_loss", name)
    hidden, weight, bias, token_weights, labels = inputs(8, 64, 300, ignored=False)
    for t in range(8):
        hidden[t] = weight[labels[t]] * (8.0 + 2.0 * t)
    out, grads, weights = run_with_grads(
        on_backend(call(lm_head_loss), name), (hidden, weight, bias, token_weights, labels)
    )
    wide = [x.double() if x.is_floating_point() else x for x in (hidden, weight, bias, token_weights, labels)]
    truth, truth_grads, _ = run_with_grads(call(reference.lm_head_loss), wide, weights)
    torch.testing.assert_close(out[1].double(), truth[1], rtol=2e-5, atol=0)
    torch.testing.assert_close(grads[0].double(), truth_grads[0], rtol=1e-3, atol=1e-12)


# ---- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reference", "cpp"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(name, softcap):
    require("lm_head_loss", name, torch.float64)
    arguments = inputs(5, 4, 7, torch.float64)
    labels = arguments.pop()
    leaves = [x.double().requires_grad_() for x in arguments]

    def run(*args):
        return call(lm_head_loss)(*args, labels, softcap=softcap, logit_scale=0.7)

    with backend(name):
        assert torch.autograd.gradcheck(run, leaves)  # each output alone, and both: the routes through loss and nll


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("route", ["loss", "nll", "both"])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1)])
def test_every_combination_of_wanted_gradients(name, route, wanted):
    require("lm_head_loss", name)
    arguments = inputs(9, 16, 40)
    pull = torch.randn(9)

    def gradients(function):
        leaves = [x.clone().requires_grad_(bool(w)) for x, w in zip(arguments[:3], wanted, strict=True)]
        loss, nll = function(leaves[0], leaves[1], arguments[4], bias=leaves[2], token_weights=arguments[3])
        total = {"loss": 3.0 * loss, "nll": (nll * pull).sum(), "both": 3.0 * loss + (nll * pull).sum()}[route]
        return torch.autograd.grad(total, [x for x in leaves if x.requires_grad])

    with backend(name):
        ours = gradients(lm_head_loss)
    for a, b in zip(ours, gradients(reference.lm_head_loss), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", EVERY)
def test_double_backward_is_refused(name):
    require("lm_head_loss", name)
    hidden, weight, _, _, labels = inputs(4, 8, 20)
    hidden.requires_grad_()
    with backend(name):
        loss, _ = lm_head_loss(hidden, weight, labels)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", EVERY)
def test_backward_twice_over_one_graph(name):
    require("lm_head_loss", name)
    hidden, weight, _, _, labels = inputs(4, 8, 20)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with backend(name):
        loss, _ = lm_head_loss(hidden, weight, labels)
    first = torch.autograd.grad(loss, leaves, torch.tensor(2.0), retain_graph=True)
    second = torch.autograd.grad(loss, leaves, torch.tensor(2.0))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", EVERY)
def test_without_gradients_values_are_the_same(name):
    require("lm_head_loss", name)
    arguments = inputs(9, 16, 40)
    with backend(name):
        with_grad = call(lm_head_loss)(arguments[0].clone().requires_grad_(), *arguments[1:])
        with torch.no_grad():
            without = call(lm_head_loss)(*arguments)
    assert with_grad[0].requires_grad
    assert not without[0].requires_grad
    torch.testing.assert_close(with_grad[1].detach(), without[1], rtol=1e-6, atol=1e-6)


# ---- layouts, boundaries, special values -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(name, layout, dtype):
    require("lm_head_loss", name, dtype)
    hidden, weight, bias, token_weights, labels = inputs(6, 37, 45, dtype)
    one_dimensional = "dense" if layout == "transposed" else layout
    arguments = [
        lay_out(hidden, layout),
        lay_out(weight, "dense" if layout == "expanded" else layout),  # equal rows: gradients of nothing but rounding
        lay_out(bias, one_dimensional),
        lay_out(token_weights, one_dimensional),
        lay_out(labels, one_dimensional),
    ]
    check(name, arguments)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_no_tokens_and_all_ignored(name, dtype):
    require("lm_head_loss", name, dtype)
    for tokens in (0, 3):
        hidden, weight, bias, token_weights, labels = inputs(tokens, 8, 20, dtype)
        leaves = [x.requires_grad_() for x in (hidden, weight, bias, token_weights)]
        with backend(name):
            loss, nll = call(lm_head_loss)(*leaves, torch.full_like(labels, -100))
        loss.backward()
        assert loss.item() == 0.0
        assert torch.equal(nll, torch.zeros(tokens))
        for leaf in leaves:
            assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_writes_stay_inside_their_buffers(name, dtype):
    require("lm_head_loss", name, dtype)
    arguments = inputs(35, 19, 133, dtype)
    leaves = [x.requires_grad_() for x in arguments[:3]]
    with backend(name), GuardedAllocations() as guarded:
        loss, nll = call(lm_head_loss)(*leaves, *arguments[3:])
        loss.backward()
    guarded.check()
    assert nll.isfinite().all()
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand(name, dtype):
    require("lm_head_loss", name, dtype)
    check(name, inputs(9, 32, 77, dtype, scale=1e4))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["hidden", "weight", "bias", "bias of the label"])
def test_inf_and_nan_as_in_torch(name, dtype, bad, where):
    require("lm_head_loss", name, dtype)
    hidden, weight, bias, token_weights, labels = inputs(5, 16, 40, dtype, ignored=False)
    labels[:] = torch.arange(5)
    if where == "hidden":
        hidden[1, 3] = bad
    elif where == "weight":
        weight[20, 3] = bad
    else:
        bias[1 if "label" in where else 20] = bad
    leaf, plain_leaf = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    with backend(name):
        loss, nll = call(lm_head_loss)(leaf, weight, bias, token_weights, labels)
    plain_loss, plain_nll = call(reference.lm_head_loss)(plain_leaf, weight, bias, token_weights, labels)
    assert torch.equal(nll.isnan(), plain_nll.isnan())
    assert torch.equal(nll == math.inf, plain_nll == math.inf)
    assert loss.isnan() == plain_loss.isnan()
    torch.testing.assert_close(nll, plain_nll, rtol=5e-2, atol=5e-2, equal_nan=True)
    loss.backward()
    plain_loss.backward()
    rows = ~plain_nll.isnan()
    if where != "weight":  # 0 * inf in the product with such a weight is NaN in torch, and here only in part
        torch.testing.assert_close(leaf.grad[rows], plain_leaf.grad[rows], rtol=5e-2, atol=5e-2, equal_nan=True)
    assert leaf.grad[~rows].isnan().all()


@pytest.mark.parametrize("name", EVERY)
def test_masked_vocabulary(name):
    """A bias of -inf removes a token, also when whole blocks are gone; the label alone is left: nll 0."""
    require("lm_head_loss", name)
    hidden, weight, bias, token_weights, labels = inputs(4, 16, 1200, ignored=False)
    bias[:] = -math.inf
    labels[:] = 1100
    bias[1100] = 0.5
    hidden.requires_grad_()
    with backend(name):
        loss, nll = call(lm_head_loss)(hidden, weight, bias, token_weights, labels)
    loss.backward()
    assert torch.equal(nll, torch.zeros(4))
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
