"""row_product: products of a few rows with what stands before and behind them, against fp64."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear, rms_norm, silu

from lmvae_fast.kernels.row_product import MOST_ROWS, Norm, row_product

from .common import (
    LAYOUTS,
    ODD_SIZES,
    GuardedAllocations,
    assert_int64_addresses,
    assert_within_error_rule,
    compiled_code,
    lay_out,
    on_backend,
    opcheck,
    raises_naming,
    require,
)

BACKENDS = ("reference", "triton")
ROOT = Path(__file__).resolve().parents[2]
NORMS = (None, "layer", "rms")
ACTIVATIONS = (None, "gelu_tanh", "swiglu", "geglu_tanh")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(rows, inputs, outputs, dtype=torch.float32, *, norm=None, activation=None, added=True, bias=True):
    """Arguments of row_product, whose terms are of size 1."""
    width = outputs // 2 if activation in ("swiglu", "geglu_tanh") else outputs
    x, weight = torch.randn(rows, inputs) * 3, torch.randn(outputs, inputs) / inputs**0.5
    options = {"activation": activation, "added": torch.randn(rows, width).to(dtype) if added else None}
    if norm is not None:
        shift = torch.randn(inputs).to(dtype) if norm == "layer" else None
        options["norm"] = Norm((1 + torch.randn(inputs)).to(dtype), shift, 1e-5, norm == "layer")
    return (x.to(dtype), weight.to(dtype), torch.randn(outputs).to(dtype) if bias else None), options


def plain(x, weight, bias=None, *, norm=None, activation=None, added=None):
    """The same by torch's functions, each of which rounds."""
    if norm is not None:
        factor, shift = norm.weight.to(x.dtype), None if norm.bias is None else norm.bias.to(x.dtype)
        width = (x.shape[1],)
        x = layer_norm(x, width, factor, shift, norm.eps) if norm.centred else rms_norm(x, width, factor, norm.eps)
    y = linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if activation == "gelu_tanh":
        y = gelu(y, approximate="tanh")
    elif activation is not None:
        gate, up = y.chunk(2, dim=1)
        y = (silu(gate) if activation == "swiglu" else gelu(gate, approximate="tanh")) * up
    return y if added is None else y + added.to(y.dtype)


def held(out, given, options):
    """Holds a result to the error rule."""
    (x, *more) = given
    assert_within_error_rule("out", out, plain(x, *more, **options), plain(x.double(), *more, **options))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 3, 5, 17])
def test_values(name, norm, activation, rows):
    require("row_product", name)
    for inputs, outputs in ((7, 2), (200, 70), (4100, 10)):
        given, options = make(rows, inputs, outputs, norm=norm, activation=activation)
        held(on_backend(row_product, name)(*given, **options), given, options)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(rows, dtype):
    require("row_product", "triton")
    if dtype == torch.bfloat16 and rows > 4:
        pytest.skip("the interpreter multiplies tiles of bf16 wrongly")
    for norm, activation in (("layer", "gelu_tanh"), ("rms", "swiglu"), (None, None)):
        given, options = make(rows, 768, 96, dtype, norm=norm, activation=activation)
        held(on_backend(row_product, "triton")(*given, **options), given, options)


@pytest.mark.parametrize("size", ODD_SIZES[1:])
def test_odd_sizes(size):
    require("row_product", "triton")
    for rows, inputs, outputs in ((2, size, 6), (2, 6, size), (min(size, 40), 6, 6)):
        given, options = make(rows, inputs, outputs, norm="layer")
        held(on_backend(row_product, "triton")(*given, **options), given, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [3, 9])
def test_layouts(layout, rows):
    require("row_product", "triton")
    (x, weight, bias), options = make(rows, 33, 21, norm="rms")
    given = lay_out(x, layout), lay_out(weight, layout), bias
    options["added"] = lay_out(options["added"], layout)
    held(on_backend(row_product, "triton")(*given, **options), given, options)


@pytest.mark.parametrize("name", BACKENDS)
def test_wider_vectors_beside_half_rows(name):
    require("row_product", name)
    (x, weight, bias), options = make(2, 64, 8, torch.float16)
    options["norm"] = Norm(1 + 0.1 * torch.randn(64), None, 1e-6, False)
    given = x, weight, bias.float()
    truth = plain(x.double(), *given[1:], **options)
    assert_within_error_rule("out", on_backend(row_product, name)(*given, **options), plain(*given, **options), truth)


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_are_independent_and_nan_stays_in_its_own(name):
    require("row_product", name)
    for rows in (4, 8):
        given, options = make(rows, 40, 12, norm="layer")
        expected = on_backend(row_product, name)(*given, **options)
        given[0][1, 5], given[0][2, 7] = float("nan"), float("inf")
        found = on_backend(row_product, name)(*given, **options)
        assert found[1:3].isnan().all()
        assert torch.equal(found[[0, 3]], expected[[0, 3]])


def test_a_row_by_itself_is_the_row_among_others():
    """Text must not depend on what else is decoded, up to the number of rows that a program has."""
    require("row_product", "triton")
    (x, *more), options = make(4, 96, 40, norm="rms", activation="swiglu", added=False)
    together = on_backend(row_product, "triton")(x, *more, **options)
    for row in range(4):
        assert torch.equal(on_backend(row_product, "triton")(x[row : row + 1], *more, **options)[0], together[row])


def test_nothing_of_no_rows():
    for name in BACKENDS:
        require("row_product", name)
        given, options = make(0, 5, 4)
        assert on_backend(row_product, name)(*given, **options).shape == (0, 4)


@pytest.mark.parametrize("rows", [3, MOST_ROWS])
def test_nothing_is_written_or_read_outside(rows):
    require("row_product", "triton")
    given, options = make(rows, 129, 37, norm="layer")
    with GuardedAllocations() as guarded:
        found = on_backend(row_product, "triton")(*given, **options)
    guarded.check()
    held(found, given, options)


def test_opcheck():
    require("row_product", "triton")
    (x, weight, bias), options = make(3, 16, 8, norm="layer", activation="swiglu")
    norm = options["norm"]
    opcheck("row_product", (x, weight, bias, *norm, 1, options["added"], False), "triton")
    opcheck("row_product", (x, weight, None, None, None, 0.0, False, -1, None, True), "triton")


def test_addresses_are_64_bit():
    from lmvae_fast.kernels.row_product import triton

    assert_int64_addresses(triton)


def test_ways_of_decoding_are_named_or_refused():
    code = "import lmvae_fast.kernels.row_product as op; print(op.WAY)"
    for value, expected in (("", "early"), ("off", "off"), ("quick", "LMVAE_ROW_PRODUCT='quick' is not one of early")):
        environment = {**os.environ, "LMVAE_ROW_PRODUCT": value}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
        assert expected in done.stdout + done.stderr


def test_bad_input():
    (x, weight, bias), options = make(3, 16, 8, norm="layer")
    norm = options["norm"]
    with raises_naming(ValueError, "[3, 16]", "[8, 15]"):
        row_product(x, weight[:, :15])
    with raises_naming(ValueError, "bias", "[7]", "[8]"):
        row_product(x, weight, bias[:7])
    with raises_naming(TypeError, "bias", "float64"):
        row_product(x, weight, bias.double())
    with raises_naming(TypeError, "weight", "float16"):
        row_product(x, weight.half())
    with raises_naming(ValueError, "norm.weight", "[15]"):
        row_product(x, weight, norm=norm._replace(weight=norm.weight[:15]))
    with raises_naming(ValueError, "added", "[3, 8]", "[3, 4]"):
        row_product(x, weight, activation="swiglu", added=options["added"])
    with raises_naming(ValueError, "relu"):
        row_product(x, weight, activation="relu")
    with raises_naming(ValueError, "[7, 16]", "even"):
        row_product(x, weight[:7], activation="swiglu")
    with raises_naming(ValueError, "x", "gradient"):
        row_product(x.clone().requires_grad_(), weight)
    with raises_naming(ValueError, "norm.weight", "gradient"):
        row_product(x, weight, norm=norm._replace(weight=norm.weight.clone().requires_grad_()))


@pytest.mark.parametrize(("tag", "early"), [("dependent", 6), ("waiting", 0)])
def test_weights_are_asked_for_before_the_kernel_waits_for_another(tag, early):
    """Of settled weights, every load that can be is above the wait: four of the weight, two of the norm."""
    require("row_product", "triton")
    code = compiled_code("row_product", f"vector-bf16-layer-768-{tag}")
    before, after = code.split("griddepcontrol.wait", 1)
    assert "griddepcontrol.launch_dependents" in after
    assert len(re.findall(r"ld\.global\.v4", before)) == early
    assert re.search(r"ld\.global", after)
