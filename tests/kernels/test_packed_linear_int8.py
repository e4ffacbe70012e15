"""packed_linear_int8: the product with the weight that whole numbers and scales stand for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lmvae_fast.kernels.packed_linear import (
    PackedLinear,
    QuantizedWeight,
    packed_linear_int8,
    quantize_gated,
    quantize_weight,
)
from lmvae_fast.kernels.packed_linear.reference import unpack

from .common import (
    LAYOUTS,
    ODD_SIZES,
    GuardedAllocations,
    assert_within_error_rule,
    lay_out,
    on_backend,
    opcheck,
    raises_naming,
    require,
)

DTYPES = (torch.float32, torch.bfloat16)


def _draw(dtype, rows, inputs, outputs):
    return torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs), torch.randn(outputs).to(dtype)


def _check(name, x, weight, bias=None, activation="none", residual=None, gate=None):
    quantized = quantize_weight(weight) if gate is None else quantize_gated(gate, weight)
    options = {"out_features": weight.shape[0], "activation": "swiglu" if gate is not None else activation}
    out = on_backend(packed_linear_int8, "cpp")(x, quantized, bias, residual=residual, **options)
    plain = on_backend(packed_linear_int8, "reference")
    double = [None if t is None else t.double() for t in (x, bias, residual)]
    truth = plain(double[0], quantized, double[1], residual=double[2], **options)
    assert_within_error_rule(name, out, plain(x, quantized, bias, residual=residual, **options), truth)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (33, 63), (70, 65)])
def test_weights_are_rounded_to_the_nearest_of_their_output(outputs, inputs, gated):
    weight, gate = torch.randn(outputs, inputs), torch.randn(outputs, inputs)
    weight[0] = 0
    q = quantize_gated(gate, weight) if gated else quantize_weight(weight)
    whole = unpack(q.values, inputs).float()
    assert torch.equal(whole.sum(-1), q.totals.float())
    stands_for = whole * q.scales[..., None]
    halves = ((slice(16), gate), (slice(16, 32), weight)) if gated else ((slice(32), weight),)
    for part, exact in halves:
        found = stands_for[:, part].reshape(-1, inputs)[:outputs]
        step = exact.abs().amax(1, keepdim=True) / 127
        assert ((found - exact).abs() <= 0.5001 * step).all()
        assert torch.equal(found.abs().amax(1), (127 * (exact.abs().amax(1) / 127)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [*ODD_SIZES, 6, 7, 12, 13, 33])
def test_rows(dtype, rows):
    require("packed_linear_int8", "cpp")
    _check(f"{rows} rows", *_draw(dtype, rows, 200, 96))


@pytest.mark.parametrize("rows", [4, 6, 8, 10])  # as many sums in registers as fit: what splits them differs
def test_sums_round_no_more_than_torchs_whatever_is_drawn(rows):
    require("packed_linear_int8", "cpp")
    for inputs in (200, 511):
        for seed in range(15):
            torch.manual_seed(seed)
            _check(f"{rows} rows, seed {seed}", *_draw(torch.float32, rows, inputs, 96))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [*ODD_SIZES, 64, 511, 512, 513, 3072])
def test_inputs(dtype, inputs):
    require("packed_linear_int8", "cpp")
    _check(f"{inputs} inputs", *_draw(dtype, 9, inputs, 40))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("outputs", [1, 31, 128, 130])
def test_outputs_activation_and_residual(dtype, activation, outputs):
    require("packed_linear_int8", "cpp")
    # torch takes one output as a dot product, in many sums that are shorter than ours
    inputs = 20 if outputs == 1 else 150
    x, weight, bias = _draw(dtype, 13, inputs, outputs)
    gate = torch.randn(outputs, inputs) / 12 if activation == "swiglu" else None
    residual = torch.randn(13, outputs).to(dtype)
    _check(activation, x, weight, None if gate is not None else bias, activation, residual, gate)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    require("packed_linear_int8", "cpp")
    x, weight, bias = _draw(torch.bfloat16, 19, 130, 70)
    _check(layout, lay_out(x, layout), lay_out(weight, layout), bias)


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-31, 1e30])
def test_sizes_of_rows(size):
    require("packed_linear_int8", "cpp")
    x, weight, _ = _draw(torch.bfloat16, 5, 70, 40)
    x[1:3] *= size
    _check(f"{size}", x, weight)


def test_a_row_of_one_large_number_keeps_its_small_ones():
    require("packed_linear_int8", "cpp")
    # beside a number 200 times as large as the others, 16 bits keep what bf16's own rounding of the result keeps
    x, weight, _ = _draw(torch.bfloat16, 8, 768, 64)
    x[:, 5] = 200.0
    weight[:, 5] = 0.0
    _check("outlier", x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_are_where_torch_has_them(dtype):
    require("packed_linear_int8", "cpp")
    x, weight, bias = _draw(dtype, 14, 64, 40)
    weight = weight.abs() + 0.1
    x[3, 5], x[13, 0] = float("nan"), float("inf")
    _check("inf", x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_or_read_outside(dtype):
    require("packed_linear_int8", "cpp")
    x, weight, bias = _draw(dtype, 7, 129, 33)
    quantized = quantize_weight(weight)
    with GuardedAllocations() as guarded:
        on_backend(packed_linear_int8, "cpp")(x, quantized, bias, out_features=33)
    guarded.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_compilation_and_registration(dtype):
    require("packed_linear_int8", "cpp")
    x, weight, bias = _draw(dtype, 9, 700, 4500)
    q = quantize_weight(weight)

    def run(x):
        return packed_linear_int8(x, q, bias, out_features=4500, activation="gelu_tanh")

    out, threads = run(x), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(x), out)
    finally:
        torch.set_num_threads(threads)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), out)
    opcheck("packed_linear_int8", (x, q.values, q.scales, q.totals, bias, torch.randn(9, 4500).to(dtype), 1, 4500))
    layer = PackedLinear(q, bias, out_features=4500, activation="gelu_tanh")
    assert torch.equal(layer(x.view(3, 3, 700)), out.view(3, 3, 4500))


@pytest.mark.parametrize("rows", [130, 600])  # more than one call of the vectors has, than one pass over the tiles
@pytest.mark.parametrize("number", [1.0, float("inf"), 1e-38])
def test_many_rows_also_where_one_has_no_whole_numbers(rows, number):
    require("packed_linear_int8", "cpp")
    x, weight, bias = _draw(torch.bfloat16, rows, 200, 40)
    x[rows - 2] *= number
    _check(f"{number}", x, weight.abs() + 0.1, bias, residual=torch.randn(rows, 40).bfloat16())


_SUMS = """
import sys, torch
from lmvae_fast.kernels.packed_linear import packed_linear_int8, quantize_weight
torch.manual_seed(0)
found = {}
for m, k, n in ((5, 64, 32), (16, 130, 33), (17, 1024, 70), (33, 3072, 96), (540, 768, 64)):
    x, q, bias = torch.randn(m, k).bfloat16(), quantize_weight(torch.randn(n, k)), torch.randn(n).bfloat16()
    x[m // 2] *= 1000
    for activation in ("none", "gelu_tanh"):
        found[f"{m} {activation}"] = packed_linear_int8(x, q, bias, out_features=n, activation=activation)
torch.save(found, sys.argv[1])
"""


def test_tiles_and_dot_products_give_the_same_numbers(tmp_path):
    """Both sum whole numbers, which is exact in any order."""
    require("packed_linear_int8", "cpp")
    if torch.ops.lmvae_fast.cpu_extension() != "amx":
        pytest.skip("no AMX tiles here, or not allowed")
    found = []
    for isa in ("avx512_vnni", "amx"):
        out = tmp_path / isa
        subprocess.run([sys.executable, "-c", _SUMS, out], check=True, env={**os.environ, "LMVAE_CPU_ISA": isa})
        found.append(torch.load(out))
    for name, sums in found[0].items():
        assert torch.equal(sums, found[1][name]), name


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512", "avx512_vnni"])
def test_every_instruction_set(isa):
    require("packed_linear_int8", "cpp")
    code = (
        "import torch\nfrom lmvae_fast.kernels.packed_linear import packed_linear_int8, quantize_weight\n"
        "from lmvae_fast.kernels.packed_linear.reference import unpack\n"
        "torch.manual_seed(0)\n"
        "for m, k, n in ((1, 5, 3), (7, 130, 33), (32, 768, 100), (129, 257, 64)):\n"
        "    for dtype, size in ((torch.float32, 1e-5), (torch.bfloat16, 2.0 ** -8)):\n"
        "        x, q = torch.randn(m, k).to(dtype), quantize_weight(torch.randn(n, k))\n"
        "        w = (unpack(q.values, k).double() * q.scales.double()[..., None]).reshape(-1, k)[:n]\n"
        "        y = packed_linear_int8(x, q, out_features=n)\n"
        "        torch.testing.assert_close(y.double(), x.double() @ w.t(), rtol=size, atol=2e-3 if m else size)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "LMVAE_CPU_ISA": isa})


def test_bad_input_is_named():
    x, weight, bias = _draw(torch.float32, 4, 70, 40)
    q = quantize_weight(weight)
    with raises_naming(ValueError, "Inf or NaN"):
        quantize_weight(torch.full((2, 2), float("nan")))
    with raises_naming(ValueError, "65537", "65536"):
        quantize_weight(torch.ones(1, 65_537))
    with raises_naming(ValueError, "x", "[4, 64]", "packed", "ceil(K / 64)"):
        packed_linear_int8(x[:, :64], q, bias, out_features=40)
    with raises_naming(TypeError, "x", "float16"):
        packed_linear_int8(x.half(), q, out_features=40)
    with raises_naming(TypeError, "bias", "bfloat16"):
        packed_linear_int8(x, q, bias.bfloat16(), out_features=40)
    with raises_naming(TypeError, "scales", "float64"):
        packed_linear_int8(x, QuantizedWeight(q.values, q.scales.double(), q.totals), out_features=40)
    with raises_naming(ValueError, "totals", "[1, 32]", "[2, 32]"):
        packed_linear_int8(x, QuantizedWeight(q.values, q.scales, q.totals[:1]), out_features=40)
    with raises_naming(ValueError, "out_features", "65", "2 panels"):
        packed_linear_int8(x, q, out_features=65)
    with raises_naming(ValueError, "gradient"):
        packed_linear_int8(x.requires_grad_(), q, out_features=40)
