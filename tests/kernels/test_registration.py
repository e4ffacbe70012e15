"""What every op says to autograd where its kernels have no answer: second derivatives, forward mode, ops without any."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.autograd import forward_ad

from lmvae_fast.kernels.backend import BackendError, backend
from lmvae_fast.kernels.coupling_flow.spec import spec_of_plan
from lmvae_fast.kernels.greedy_head import greedy_head, pack_head
from lmvae_fast.kernels.latent_attention import latent_attention, latent_attention_decode, latent_attention_step
from lmvae_fast.kernels.latent_kv import latent_kv
from lmvae_fast.kernels.lm_head_loss import lm_head_loss
from lmvae_fast.kernels.packed_linear import PackedLinear, pack_weight, packed_linear
from lmvae_fast.kernels.posterior import posterior_sample
from lmvae_fast.kernels.sample_token import sample_token

from .common import on_backend, raises_naming, require
from .test_coupling_flow import SPECS, Bound

FAST = ("cpp", "triton")
OFFSETS = torch.tensor([0, 2, 5], dtype=torch.int32)


def latent(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def attend(q, k, v):
    return latent_attention(q, k, v, None, None, cu_seqlens=OFFSETS, visibility="prefix", scale=0.4)


LABELS = torch.tensor([1, 0, -100, 4, 2])
# name of the op, a function of floating tensors, those tensors
TWICE = {
    **{
        f"posterior {kl}": ("posterior_sample", lambda m, s, kl=kl: posterior_sample(m, s, seed=1, kl=kl, kl_target=0.2),
                            [(3, 5), (3, 5)])
        for kl in ("sum", "dim_threshold", "free_bits", "sample_threshold")
    },
    "posterior, 2 samples": ("posterior_sample", lambda m, s: posterior_sample(m, s, seed=1, num_samples=2), [(3, 5), (3, 5)]),
    "latent_kv": ("latent_kv", lambda z, w, b: latent_kv(z, w, b), [(3, 4), (1, 2, 1, 2, 3, 4), (1, 2, 1, 2, 3)]),
    "latent_kv, dropout": ("latent_kv", lambda z, w: latent_kv(z, w, dropout=0.3, seed=3), [(3, 4), (1, 2, 1, 2, 3, 4)]),
}  # fmt: skip
FLOWS = {
    f"flow {direction} {memory}": {"inverse": direction == "inverse", "memory": memory}
    for direction in ("forward", "inverse")
    for memory in ("save", "recompute")
}


def case(name):
    """(op, function, fp64 inputs) of a case of TWICE or FLOWS."""
    if name in TWICE:
        op, function, shapes = TWICE[name]
        return op, function, [latent(*shape) for shape in shapes]
    spec = "rnvp, sigmoid clamp, conditional" if "save" in name else "two hidden layers, gelu"
    bound = Bound(SPECS[spec], torch.float64)
    return "coupling_flow", functools.partial(bound.op, **FLOWS[name]), bound.inputs(3)


# ---- second derivatives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TWICE, *FLOWS])
def test_second_derivatives_in_fp64(name):
    op, function, inputs = case(name)
    require(op, "cpp", torch.float64)
    with backend("cpp"):
        leaves = [x.requires_grad_() for x in inputs]
        assert torch.autograd.gradgradcheck(function, leaves, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("choice", FAST)
@pytest.mark.parametrize(
    "name", ["posterior free_bits", "latent_kv, dropout", "flow forward save", "flow inverse recompute"]
)
def test_a_penalty_on_the_gradient_is_the_references(name, choice):
    """The loss's gradient, and the gradient of that gradient's square, in fp32 on every backend."""
    op, function, inputs = case(name)
    require(op, choice)
    found = []
    for run in (choice, "reference"):
        leaves = [x.float().requires_grad_() for x in inputs]
        with backend(run):
            outputs = function(*leaves)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            total = sum((out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outputs)
            first = torch.autograd.grad(total, leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append([*first, *second])
    assert sum(g.abs().sum() for g in found[1][len(inputs) :]) > 0.1, "nothing to compare"
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_third_derivatives():
    require("latent_kv", "cpp", torch.float64)
    weight = latent(1, 2, 1, 1, 2, 3)

    def cubed(z):
        return latent_kv(z, weight).pow(3).sum()

    z = latent(1, 3).requires_grad_()
    grads = cubed(z)
    for _ in range(3):
        (grads,) = torch.autograd.grad(grads.sum(), z, create_graph=True)
    rows = weight.view(-1, 3)
    torch.testing.assert_close(grads, (6 * rows * rows.sum(1, keepdim=True) ** 2).sum(0)[None])


@pytest.mark.parametrize("choice", FAST)
@pytest.mark.parametrize("op", ["lm_head_loss", "latent_attention"])
def test_second_derivatives_that_do_not_exist_are_refused(op, choice):
    require(op, choice)
    x = torch.randn(5, 2, 4, requires_grad=True)
    with backend(choice):
        if op == "latent_attention":
            out = attend(x, x, x)
        else:
            out = lm_head_loss(x.flatten(1), torch.randn(7, 8), LABELS)[0]
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=op):
        torch.autograd.grad(grad.square().sum(), x)


def test_the_spec_of_a_plan():
    for spec in SPECS.values():
        ints, floats = spec.plan
        assert spec_of_plan(tuple(ints), tuple(floats)) == spec


# ---- forward mode --------------------------------------------------------------------------------------------------------

FORWARD = {
    **{name: TWICE[name] for name in ("posterior free_bits", "latent_kv, dropout")},
    "attention": ("latent_attention", attend, [(5, 2, 4), (5, 1, 4), (5, 1, 4)]),
    "loss": (
        "lm_head_loss",
        lambda h, w, b: lm_head_loss(h, w, LABELS, bias=b, softcap=3.0)[0],
        [(5, 8), (7, 8), (7,)],
    ),
    "nll": ("lm_head_loss", lambda h, w: lm_head_loss(h, w, LABELS, chunk=2)[1], [(5, 8), (7, 8)]),
}


def forward_case(name):
    if name not in FORWARD:
        return case(name)
    op, function, shapes = FORWARD[name]
    return op, function, [latent(*shape) for shape in shapes]


@pytest.mark.parametrize("name", [*FORWARD, "flow forward save"])
def test_forward_mode_is_the_directional_derivative(name):
    _, function, inputs = forward_case(name)
    tangents = [torch.randn_like(x) for x in inputs]

    def total(*tensors):
        outputs = function(*tensors)
        return sum(out.sin().sum() for out in ([outputs] if isinstance(outputs, torch.Tensor) else outputs))

    leaves = [x.clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(total(*leaves), leaves)
    expected = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    torch.testing.assert_close(torch.func.jvp(total, tuple(inputs), tuple(tangents))[1], expected)
    with forward_ad.dual_level():  # one input carries a tangent, whichever it is
        for i, (x, tangent, grad) in enumerate(zip(inputs, tangents, grads, strict=True)):
            dual = [forward_ad.make_dual(x, tangent) if j == i else other for j, other in enumerate(inputs)]
            found = forward_ad.unpack_dual(total(*dual)).tangent
            torch.testing.assert_close(found, (grad * tangent).sum())
        plain = forward_ad.unpack_dual(total(*inputs)).tangent
        assert plain is None


@pytest.mark.parametrize("choice", FAST)
@pytest.mark.parametrize("name", [*FORWARD, "flow forward save"])
def test_a_forced_backend_refuses_forward_mode(name, choice):
    op, function, inputs = forward_case(name)
    require(op, choice)
    inputs = [x.float() for x in inputs]
    with backend(choice), raises_naming(BackendError, op, choice, "forward-mode"):
        torch.func.jvp(lambda x: function(x, *inputs[1:]), (inputs[0],), (inputs[0],))


# ---- ops without derivatives ---------------------------------------------------------------------------------------------


def without_derivatives():
    """(op, name of an argument, a function of it, a value for it) of every op and argument that could end a graph."""
    q, new, cache = torch.randn(2, 2, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 6, 8)
    at, lengths = torch.tensor([0, 3]), torch.tensor([3, 6])
    head, packed, residual = pack_head(torch.randn(9, 8)), pack_weight(torch.randn(9, 8)), torch.randn(2, 9)
    bias, module = torch.randn(9), PackedLinear(packed, out_features=9)

    def decode(q=q, k_cache=cache, v_cache=cache):
        return latent_attention_decode(q, k_cache, v_cache, lengths, scale=0.3)

    def step(q=q, k=new, v=new, k_cache=cache, v_cache=cache):
        return latent_attention_step(q, k, v, k_cache.clone(), v_cache.clone(), at, lengths, scale=0.3)

    def linear(x=q[:, 0], packed=packed, bias=bias, residual=residual):
        return packed_linear(x, packed, bias, out_features=9, residual=residual)

    yield from (
        ("latent_attention_decode", name, decode, x) for name, x in (("q", q), ("k_cache", cache), ("v_cache", cache))
    )
    yield from (
        ("latent_attention_step", name, step, x) for name, x in (("q", q), ("k", new), ("v", new), ("k_cache", cache))
    )
    yield from (
        ("packed_linear", name, linear, x) for name, x in (("x", q[:, 0]), ("bias", bias), ("residual", residual))
    )
    yield "PackedLinear", "x", lambda x: module(x), q[:, 0]
    yield "PackedLinear", "residual", lambda residual: module(q[:, 0], residual), residual
    yield "greedy_head", "hidden", lambda hidden: greedy_head(hidden, head), q[:, 0]
    yield "sample_token", "logits", lambda logits: sample_token(logits, seed=1, logprob=True), residual


@pytest.mark.parametrize("choice", ["reference", "cpp"])
def test_ops_without_derivatives_end_no_graph_unsaid(choice):
    require("packed_linear", choice)
    seen = set()
    for op, name, function, value in without_derivatives():
        run = on_backend(function, choice)
        shown = "packed_linear" if op == "PackedLinear" and choice == "reference" else op
        with raises_naming(ValueError, shown, name, "gradient"):
            run(**{name: value.clone().requires_grad_()})
        with torch.no_grad():
            run(**{name: value.clone().requires_grad_()})
        with forward_ad.dual_level(), raises_naming(ValueError, shown, name, "tangent"):
            run(**{name: forward_ad.make_dual(value, value)})
        seen.add(op)
    assert len(seen) == 6
