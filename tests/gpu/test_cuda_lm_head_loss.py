"""lm_head_loss on a CUDA device: cuBLAS products and the Triton kernels between them."""

from __future__ import annotations

import math

import pytest
import torch

from lmvae_fast.kernels.lm_head_loss import lm_head_loss, reference
from tests.kernels.common import (
    GRAD_FACTOR,
    LAYOUTS,
    ODD_SIZES,
    VALUE_FACTOR,
    GuardedAllocations,
    assert_deterministic,
    assert_fullgraph_equal,
    assert_within_error_rule,
    run_with_grads,
)
from tests.kernels.test_lm_head_loss import call, inputs

from .common import DTYPES, assert_no_host_sync, assert_replays, cuda, triton

pytestmark = pytest.mark.gpu
op, plain = triton(call(lm_head_loss)), call(reference.lm_head_loss)
NAMES = ("hidden", "weight", "bias", "token_weights")
FEW = 64


def check(arguments, **kwargs):
    """The error rule for every output and gradient of many values. It compares the largest of their errors, so one of FEW
    values would pass or fail by luck: those may be off by some roundings of the terms that they sum."""
    outputs, grads, weights = run_with_grads(op, arguments, **kwargs)
    eager_outputs, eager_grads, _ = run_with_grads(plain, arguments, weights, **kwargs)
    wide = [x.double() if x.is_floating_point() else x for x in arguments]
    true_outputs, true_grads, _ = run_with_grads(plain, wide, weights, **kwargs)
    tokens, vocabulary = arguments[0].shape[0], arguments[1].shape[0]
    # A token pulls on an operand by at most about 1 times that operand, times its weights (at most 1.1 and some 4).
    size = 5 * (1 + max(x.abs().max().item() for x in wide[:3]) + true_outputs[1].abs().max().item())
    named = [*zip(("loss", "nll"), outputs, eager_outputs, true_outputs, [VALUE_FACTOR] * 2, strict=True)]
    named += zip(NAMES, grads, eager_grads, true_grads, [GRAD_FACTOR] * 4, strict=True)
    for name, ours, eager, truth, factor in named:
        if ours.numel() > FEW:
            assert_within_error_rule(name, ours, eager, truth, factor=factor)
        else:
            eps = torch.finfo(ours.dtype).eps
            terms = size * (tokens if ours.dim() == 0 or ours.shape[0] == vocabulary else 1)
            torch.testing.assert_close(ours.double(), truth, rtol=16 * eps, atol=16 * eps * terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ODD_SIZES)
def test_error_rule_at_odd_sizes(dtype, size):
    check(cuda(inputs(67, size, 131, dtype)))
    check(cuda(inputs(size, 33, 131, dtype)))
    check(cuda(inputs(67, 33, size, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.37])
def test_error_rule_with_softcap_and_scale(dtype, softcap, logit_scale):
    check(cuda(inputs(67, 48, 301, dtype)), softcap=softcap, logit_scale=logit_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [50_257, 128_256, 151_936])
def test_real_vocabularies_in_several_chunks(dtype, vocabulary):
    check(cuda(inputs(100, 64, vocabulary, dtype)), chunk=33)


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_the_size_of_gpt2(dtype):
    check(cuda(inputs(400, 768, 50_257, dtype, scale=1.0)))


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_change_nothing_but_rounding(chunk):
    check(cuda(inputs(67, 20, 90)), chunk=chunk)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(layout, dtype):
    check(cuda(inputs(66, 37, 91, dtype), layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 3])
def test_no_tokens_and_all_ignored(dtype, tokens):
    hidden, weight, bias, token_weights, labels = cuda(inputs(tokens, 8, 20, dtype))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias, token_weights)]
    loss, nll = op(*leaves, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert (nll == 0).all()
    assert all((leaf.grad == 0).all() for leaf in leaves)


def test_labels_outside_the_vocabulary_are_nan_and_read_nothing():
    for label in (20, -1, -101, 2**40):
        hidden, weight, bias, token_weights, labels = cuda(inputs(4, 8, 20, ignored=False))
        labels[3] = label
        hidden.requires_grad_()
        loss, nll = op(hidden, weight, bias, token_weights, labels)
        loss.backward()
        assert nll[3].isnan() and nll[:3].isfinite().all()
        assert hidden.grad[3].isnan().all() and hidden.grad[:3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand(dtype):
    check(cuda(inputs(67, 32, 77, dtype, scale=1e4)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [1, 20])  # the label's own logit, another's
def test_inf_and_nan_as_in_torch(bad, where):
    hidden, weight, bias, token_weights, labels = inputs(5, 16, 40, ignored=False)
    labels[:] = torch.arange(5)
    bias[where] = bad
    arguments = cuda([hidden, weight, bias, token_weights, labels])
    (_, ours), (_, plain_nll) = op(*arguments), plain(*arguments)
    torch.testing.assert_close(ours, plain_nll, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_small_writes_stay_inside_their_buffers():
    for dtype in (torch.float32, torch.bfloat16):
        for vocabulary in (133, 4099):
            arguments = cuda(inputs(35, 19, vocabulary, dtype))
            leaves = [x.requires_grad_() for x in arguments[:3]]
            with GuardedAllocations() as guarded:
                loss, nll = op(*leaves, *arguments[3:])
                loss.backward()
            guarded.check()
            assert nll.isfinite().all()
            assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_run_to_run(dtype):
    assert_deterministic(op, cuda(inputs(200, 64, 5003, dtype)))


def test_no_host_synchronisation():
    assert_no_host_sync(op, cuda(inputs(35, 19, 133)), chunk=16)
    hidden, weight, bias, _, labels = cuda(inputs(35, 19, 133, torch.bfloat16))
    assert_no_host_sync(lambda h, w, b, y: op(h, w, b, None, y), [hidden, weight, bias, labels])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fullgraph_compile_gives_the_same(dtype):
    assert_fullgraph_equal(call(lm_head_loss), cuda(inputs(7, 16, 32, dtype)), compiler="inductor", softcap=4.0)


def test_graph_replays_on_new_values():
    assert_replays(op, cuda(inputs(35, 24, 133)), chunk=16)


def test_frozen_head_never_holds_the_logits():
    """Extra memory of a training step stays below a fifth of what fp32 logits of all tokens alone would take."""
    tokens, width, vocabulary = 8192, 256, 50_257
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16) / 16
    labels = torch.randint(0, vocabulary, (tokens,), device="cuda")

    def step():
        op(hidden, weight, None, None, labels)[0].backward()

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < tokens * vocabulary * 4 / 5


def test_large_logits(card):
    """One chunk of more than 2^31 logits: the last tokens have the loss and the gradient that they have alone."""
    tokens, width, vocabulary = 14_400, 64, 151_936
    if card < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of device memory, {card / 2**30:.0f} are free")
    assert tokens * vocabulary > 2**31
    arguments = cuda(inputs(tokens, width, vocabulary, torch.bfloat16, ignored=False))
    (_, nll), grads, weights = run_with_grads(op, arguments, chunk=tokens)
    hidden, weight, bias, token_weights, labels = arguments
    tail = slice(tokens - 5, tokens)
    alone = [hidden[tail], weight, bias, token_weights[tail], labels[tail]]
    (_, tail_nll), tail_grads, _ = run_with_grads(op, alone, [weights[0], weights[1][tail]], chunk=tokens)
    torch.testing.assert_close(nll[tail], tail_nll, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[0][tail], tail_grads[0], rtol=2e-2, atol=1e-3)
