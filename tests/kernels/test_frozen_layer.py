"""frozen_layer: norms, activations and rotary positions of rows, and their gradients by the inputs, against fp64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from lmvae_fast.kernels import frozen_layer
from lmvae_fast.kernels.frozen_layer import reference

from .common import (
    GRAD_FACTOR,
    ODD_SIZES,
    assert_int64_addresses,
    assert_within_error_rule,
    on_backend,
    opcheck,
    raises_naming,
    require,
)

BACKENDS = ("reference", "cpp", "triton")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _rows(count: int, width: int, dtype: torch.dtype, spread: float = 1.0) -> torch.Tensor:
    """A slice of a wider matrix: rows are dense, but not one after another."""
    return (spread * torch.randn(count, width + 5)).to(dtype)[:, 2 : 2 + width]


def _gradient(function, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x), x, grad)[0]


def _held(function, name: str, out, x, grad=None, factor=2.0):
    """Hold ``out`` to the error rule against a function of x in its dtype and in fp64; or against its gradient."""
    if grad is None:
        return assert_within_error_rule(name, out, function(x), function(x.double()), factor)
    truth = _gradient(function, x.double(), grad.double())
    assert_within_error_rule(name, out, _gradient(function, x, grad), truth, GRAD_FACTOR)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("width", [*ODD_SIZES[1:], 768, 8200])
def test_norm_and_its_gradient(name, dtype, centred, width):
    require("frozen_layer", name)
    x, grad, added = (_rows(7, width, dtype, spread) for spread in (3.0, 1.0, 1.0))
    weight, bias = (1 + torch.randn(width)).to(dtype), torch.randn(width).to(dtype) if centred else None

    def plain(x):
        factor, shift = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return layer_norm(x, (width,), factor, shift, 1e-5) if centred else rms_norm(x, (width,), factor, 1e-5)

    y, stats = on_backend(frozen_layer.norm, name)(x, weight, bias, eps=1e-5, centred=centred)
    _held(plain, "norm", y, x)
    total, of_total, stats_of_total = on_backend(frozen_layer.add_norm, name)(
        x, added, weight, bias, eps=1e-5, centred=centred
    )
    assert torch.equal(total, x + added)
    _held(plain, "norm of a sum", of_total, total)
    _, expected = on_backend(frozen_layer.norm, name)(total, weight, bias, eps=1e-5, centred=centred)
    torch.testing.assert_close(stats_of_total, expected)
    run = on_backend(frozen_layer.norm_gradient, name)
    _held(plain, "gradient", run(grad, x, stats, weight, centred=centred), x, grad)
    out = run(grad, x, stats, weight, centred=centred, added=added)
    truth = _gradient(plain, x.double(), grad.double()) + added.double()
    assert_within_error_rule("added", out, _gradient(plain, x, grad) + added, truth, GRAD_FACTOR)


@pytest.mark.parametrize("name", BACKENDS)
def test_factors_of_a_norm_may_be_wider_than_its_rows(name):
    """Gemma's are 1 + w: rounded to bf16 they would be off by as much as a whole rounding of the rows."""
    require("frozen_layer", name)
    x, grad = _rows(7, 96, torch.bfloat16, 3.0), _rows(7, 96, torch.bfloat16)
    weight = 1 + 0.1 * torch.randn(96)

    def plain(x):
        return rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), (96,), None, 1e-6) * weight.to(
            torch.promote_types(x.dtype, torch.float32)
        )

    y, stats = on_backend(frozen_layer.norm, name)(x, weight, eps=1e-6, centred=False)
    _held(lambda x: plain(x).to(x.dtype), "norm", y, x)
    out = on_backend(frozen_layer.norm_gradient, name)(grad, x, stats, weight, centred=False)
    _held(lambda x: plain(x).to(x.dtype), "gradient", out, x, grad)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
@pytest.mark.parametrize("width", [*ODD_SIZES, 256, 1030])
def test_activation_and_its_gradient(name, dtype, kind, width):
    require("frozen_layer", name)
    gated = kind in reference.GATED
    x, grad = _rows(5, (1 + gated) * width, dtype, 4.0), _rows(5, width, dtype)

    def plain(x):
        if not gated:
            return gelu(x, approximate="tanh")
        gate, up = x.chunk(2, dim=1)
        return (silu(gate) if kind == "swiglu" else gelu(gate, approximate="tanh")) * up

    _held(plain, "activation", on_backend(frozen_layer.activation, name)(x, kind), x)
    _held(plain, "gradient", on_backend(frozen_layer.activation_gradient, name)(grad, x, kind), x, grad)


@pytest.mark.parametrize("name", BACKENDS)
def test_activations_of_extreme_numbers(name):
    require("frozen_layer", name)
    big = torch.tensor([[-float("inf"), -1e4, -60.0, 0.0, 60.0, 1e4, float("inf"), float("nan")]])
    out = on_backend(frozen_layer.activation, name)(big[:, 1:6], "gelu_tanh")
    assert torch.equal(out, gelu(big[:, 1:6], approximate="tanh").clamp(min=0.0) + 0.0)
    slope = on_backend(frozen_layer.activation_gradient, name)(torch.ones(1, 5), big[:, 1:6], "gelu_tanh")
    torch.testing.assert_close(slope, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]))
    assert on_backend(frozen_layer.activation, name)(big[:, 7:], "gelu_tanh").isnan().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "dim", "rest"), [(1, 2, 0), (3, 16, 0), (4, 64, 70), (2, 6, 1), (0, 8, 3), (2, 300, 1)]
)
def test_rotary_positions_and_back(name, dtype, heads, dim, rest):
    require("frozen_layer", name)
    x = _rows(9, heads * dim + rest, dtype)
    # Angles of a half that are not those of the other: nothing may depend on their being alike.
    cos, sin = torch.randn(9, dim).to(dtype), torch.randn(9, dim).to(dtype)

    def plain(x, back=False):
        return reference.rotate(x, cos.to(x.dtype), sin.to(x.dtype), heads, back)

    turned = x.clone()
    assert on_backend(frozen_layer.rotate_, name)(turned, cos, sin, heads=heads) is turned
    _held(plain, "rotary", turned, x)
    assert torch.equal(turned[:, heads * dim :], x[:, heads * dim :])
    grad = _rows(9, heads * dim + rest, dtype)
    back = on_backend(frozen_layer.rotate_, name)(grad.clone(), cos, sin, heads=heads, back=True)
    _held(plain, "gradient", back, x, grad)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_rows(name):
    require("frozen_layer", name)
    x, weight = torch.empty(0, 8), torch.ones(8)
    y, stats = on_backend(frozen_layer.norm, name)(x, weight, eps=1e-5)
    assert y.shape == (0, 8) and stats.shape == (0, 2)
    assert on_backend(frozen_layer.norm_gradient, name)(x, x, stats, weight).shape == (0, 8)
    assert on_backend(frozen_layer.activation, name)(x, "swiglu").shape == (0, 4)
    assert on_backend(frozen_layer.activation_gradient, name)(x[:, :4], x, "swiglu").shape == (0, 8)


@pytest.mark.parametrize("name", BACKENDS[1:])
def test_primitives_keep_torch_s_rules(name):
    require("frozen_layer", name)
    x, weight, stats = torch.randn(4, 8), torch.randn(8), torch.rand(4, 2)
    opcheck("frozen_norm", (x, weight, None, 1e-5, False), name)
    opcheck("frozen_norm", (torch.randn(8, 4).t(), weight, None, 1e-5, False), name)  # what comes out is dense
    opcheck("frozen_norm_bwd", (x, x, stats, weight, x, True), name)
    opcheck("frozen_activation", (x, 1), name)
    opcheck("frozen_activation_bwd", (x[:, :4], x, 1), name)
    opcheck("frozen_rotary", (x.clone(), x[:, :4].contiguous(), x[:, 4:].contiguous(), 2, False), name)
    if name == "triton":
        opcheck("frozen_add_norm", (x, x, weight, None, 1e-5, True), name)


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The copies for older CPUs, each in a process of its own."""
    require("frozen_layer", "cpp")
    tests = "test_norm_and or test_activation_and or test_rotary"
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", f"({tests}) and cpp"]
    done = subprocess.run(command, env={**os.environ, "LMVAE_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_addresses_are_64_bit():
    pytest.importorskip("triton", reason="triton is not installed")
    from lmvae_fast.kernels.frozen_layer import triton

    assert_int64_addresses(triton)


def test_bad_input_is_named():
    x, weight = torch.randn(3, 8), torch.randn(8)
    stats = frozen_layer.norm(x, weight, eps=1e-5)[1]
    with raises_naming(ValueError, "x", "[8]"):
        frozen_layer.norm(weight, weight, eps=1e-5)
    with raises_naming(ValueError, "weight", "[7]", "[8]"):
        frozen_layer.norm(x, weight[:7], eps=1e-5)
    with raises_naming(ValueError, "added", "[2, 8]", "[3, 8]"):
        frozen_layer.add_norm(x, x[:2], weight, eps=1e-5)
    with raises_naming(TypeError, "bias", "float64"):
        frozen_layer.norm(x, weight, weight.double(), eps=1e-5)
    with raises_naming(ValueError, "stats", "[2, 2]", "[3, 2]"):
        frozen_layer.norm_gradient(x, x, stats[:2], weight)
    with raises_naming(ValueError, "added", "[2, 8]", "[3, 8]"):
        frozen_layer.norm_gradient(x, x, stats, weight, added=x[:2])
    with raises_naming(ValueError, "relu", "gelu_tanh"):
        frozen_layer.activation(x, "relu")
    with raises_naming(ValueError, "[3, 7]", "even"):
        frozen_layer.activation(x[:, :7], "swiglu")
    with raises_naming(ValueError, "grad", "[3, 8]", "[3, 4]"):
        frozen_layer.activation_gradient(x, x, "swiglu")
    with raises_naming(ValueError, "3 heads", "[3, 4]"):
        frozen_layer.rotate_(x, x[:, :4], x[:, 4:], heads=3)
    with raises_naming(ValueError, "x", "share"):
        frozen_layer.rotate_(x[:1].expand(3, 8), x[:, :4], x[:, 4:], heads=1)
    with raises_naming(ValueError, "frozen_layer.norm", "gradient"):
        frozen_layer.norm(x.clone().requires_grad_(), weight, eps=1e-5)
