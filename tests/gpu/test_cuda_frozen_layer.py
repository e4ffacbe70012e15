"""frozen_layer's Triton kernels on a CUDA device, and the layers that training and decoding make of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from lmvae_fast.kernels import frozen_layer
from lmvae_fast.kernels.frozen_layer import reference
from lmvae_fast.models.decoder.prepared_weights import exchanges
from lmvae_fast.models.decoder.training_body import trained_through
from lmvae_fast.testing import make_model
from tests.kernels.common import GRAD_FACTOR, ODD_SIZES, assert_within_error_rule, require

from .common import DTYPES, capture, no_host_sync, triton

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _has_a_triton_form(_needs_cuda):
    require("frozen_layer", "triton", device="cuda")


def _rows(count, width, dtype, spread=1.0):
    return (spread * torch.randn(count, width + 5, device="cuda")).to(dtype)[:, 2 : 2 + width]


def _gradient(function, x, grad):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x), x, grad)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("width", [*ODD_SIZES[1:], 576, 768, 4096, 8200])
def test_norms(dtype, centred, width):
    torch.manual_seed(0)
    x, grad, added = (_rows(67, width, dtype, spread) for spread in (3.0, 1.0, 1.0))
    weight = (1 + torch.randn(width, device="cuda")).to(dtype)
    bias = torch.randn(width, device="cuda").to(dtype) if centred else None

    def plain(x):
        factor, shift = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return layer_norm(x, (width,), factor, shift, 1e-5) if centred else rms_norm(x, (width,), factor, 1e-5)

    total, y, stats = triton(frozen_layer.add_norm)(x, added, weight, bias, eps=1e-5, centred=centred)
    assert torch.equal(total, x + added)
    assert_within_error_rule("norm", y, plain(total), plain(total.double()))
    out = triton(frozen_layer.norm_gradient)(grad, total, stats, weight, centred=centred)
    truth = _gradient(plain, total.double(), grad.double())
    assert_within_error_rule("gradient", out, _gradient(plain, total, grad), truth, GRAD_FACTOR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
@pytest.mark.parametrize("width", [*ODD_SIZES, 1536, 3072])
def test_activations(dtype, kind, width):
    torch.manual_seed(0)
    gated = kind in reference.GATED
    x, grad = _rows(65, (1 + gated) * width, dtype, 4.0), _rows(65, width, dtype)

    def plain(x):
        if not gated:
            return gelu(x, approximate="tanh")
        gate, up = x.chunk(2, dim=1)
        return (silu(gate) if kind == "swiglu" else gelu(gate, approximate="tanh")) * up

    assert_within_error_rule(kind, triton(frozen_layer.activation)(x, kind), plain(x), plain(x.double()))
    out = triton(frozen_layer.activation_gradient)(grad, x, kind)
    truth = _gradient(plain, x.double(), grad.double())
    assert_within_error_rule(f"{kind}'s gradient", out, _gradient(plain, x, grad), truth, GRAD_FACTOR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "rest"), [(3, 16, 0), (12, 64, 70), (2, 6, 1), (2, 300, 1)])
def test_rotary_positions_and_back(dtype, heads, dim, rest):
    torch.manual_seed(0)
    x = _rows(33, heads * dim + rest, dtype)
    cos, sin = (torch.randn(33, dim, device="cuda").to(dtype) for _ in range(2))
    for back in (False, True):
        turned = triton(frozen_layer.rotate_)(x.clone(), cos, sin, heads=heads, back=back)
        truth = reference.rotate(*(part.double() for part in (x, cos, sin)), heads, back)
        assert_within_error_rule("rotary", turned, reference.rotate(x, cos, sin, heads, back), truth)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_training_and_decoding_go_through_these_layers(family):
    model = make_model(family).cuda()
    with trained_through(model.decoder) as body:
        model(["a cat sat", "dogs eat"]).loss.backward()
        assert body.runs == "prepared layers"
    assert exchanges(model.decoder, 3)[0][0] is model.decoder.body


def test_nothing_waits_and_everything_is_captured():
    torch.manual_seed(0)
    x, added, weight = (
        _rows(8, 96, torch.bfloat16),
        _rows(8, 96, torch.bfloat16),
        torch.ones(96, device="cuda").bfloat16(),
    )

    def step():
        total, y, stats = triton(frozen_layer.add_norm)(x, added, weight, None, eps=1e-5, centred=False)
        inner = triton(frozen_layer.activation)(y, "swiglu")
        grad = triton(frozen_layer.activation_gradient)(inner, y, "swiglu")
        return triton(frozen_layer.norm_gradient)(grad, total, stats, weight, centred=False, added=total)

    expected = step()
    with no_host_sync():
        step()
    graph, out = capture(step)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
