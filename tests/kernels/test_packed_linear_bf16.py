"""packed_linear over bf16 weights: torch's linear in fp32 arithmetic, rounded once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import gelu, linear, silu

from lmvae_fast.kernels.packed_linear import PackedLinear, choices, pack_gated, pack_weight, packed_linear
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

BACKENDS = ("reference", "cpp")


def _draw(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(*shape).bfloat16() for shape in ((rows, inputs), (outputs, inputs), (outputs,)))


def _plain(x, weight, bias, activation="none", residual=None, gate=None):
    y = silu(linear(x, gate)) * linear(x, weight) if gate is not None else linear(x, weight, bias)
    y = gelu(y, approximate="tanh") if activation == "gelu_tanh" else y
    return y if residual is None else y + residual


def _check(name, function, x, weight, bias, activation="none", residual=None, gate=None):
    packed = pack_weight(weight) if gate is None else pack_gated(gate, weight)
    options = {"out_features": weight.shape[0], "residual": residual}
    out = function(x, packed, bias, activation="swiglu" if gate is not None else activation, **options)
    double = [None if t is None else t.double() for t in (x, weight, bias, residual, gate)]
    truth = _plain(*double[:3], activation, *double[3:])
    assert_within_error_rule(name, out, _plain(x, weight, bias, activation, residual, gate), truth)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("outputs", [1, 33, 70])
@pytest.mark.parametrize("inputs", [1, 31, 32, 65])
def test_the_layout_holds_the_weight_and_zeros(inputs, outputs, gated):
    weight, gate = torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    packed = pack_gated(gate, weight) if gated else pack_weight(weight)
    assert packed.is_contiguous()
    panels = unpack(packed, packed.shape[1] * 32)
    assert (panels[..., inputs:] == 0).all()
    halves = (panels[:, :16], panels[:, 16:]) if gated else (panels,)
    for half, expected in zip(halves, (gate, weight) if gated else (weight,), strict=True):
        assert torch.equal(half[..., :inputs].reshape(-1, inputs)[:outputs], expected)


@pytest.mark.parametrize("name", BACKENDS)
# Around tiles of 12, 16 and 32.
@pytest.mark.parametrize("rows", [*ODD_SIZES, 3, 4, 6, 8, 9, 11, 12, 13, 24, 25, 33, 161])
def test_rows(name, rows):
    require("packed_linear", name)
    _check(f"{rows} rows", on_backend(packed_linear, name), *_draw(rows, 200, 96))


@pytest.mark.parametrize("inputs", [*ODD_SIZES, 32, 64, 255, 256, 513, 3072])  # around steps of 32, pieces of 256
@pytest.mark.parametrize("rows", [1, 10, 40])
def test_inputs(inputs, rows):
    require("packed_linear", "cpp")
    _check(f"{inputs} inputs", on_backend(packed_linear, "cpp"), *_draw(rows, inputs, 64))


# Half a block, one, two; many groups of panels; several chunks of the depth; several passes.
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(5, 96, 700), (30, 70, 700), (40, 96, 1100), (300, 3072, 70), (520, 130, 70), (512, 1024, 1200)],
)
def test_large_products_on_tiles(rows, inputs, outputs):
    require("packed_linear", "cpp")
    _check(f"{rows} rows", on_backend(packed_linear, "cpp"), *_draw(rows, inputs, outputs))


@pytest.mark.parametrize("outputs", ODD_SIZES)
@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("added", [False, True])
def test_outputs_activation_and_residual(outputs, activation, added):
    require("packed_linear", "cpp")
    x, weight, bias = _draw(13, 150, outputs)
    residual = torch.randn(13, outputs).bfloat16() if added else None
    gate = (torch.randn(outputs, 150) / 12).bfloat16() if activation == "swiglu" else None
    bias = None if gate is not None else bias
    _check(activation, on_backend(packed_linear, "cpp"), x, weight, bias, activation, residual, gate)


def test_bias_activation_and_residual_are_rounded_once():
    require("packed_linear", "cpp")
    # 1 + 2^-9 is halfway between two numbers of bf16: rounded before the residual is added, the last bit is lost.
    x, weight = torch.tensor([[1.0, 2.0**-9]]).bfloat16(), torch.ones(1, 2).bfloat16()
    out = on_backend(packed_linear, "cpp")(
        x, pack_weight(weight), out_features=1, residual=torch.tensor([[-1.0]]).bfloat16()
    )
    assert out.item() == 2.0**-9


@pytest.mark.parametrize("rows", [3, 40])
def test_nan_and_inf_are_where_torch_has_them(rows):
    require("packed_linear", "cpp")
    x, weight, bias = _draw(rows, 64, 70)
    x[1, 5], x[2, 0], weight[7, 9], weight[60, 1] = float("nan"), float("inf"), -float("inf"), 3.3e38
    weight[:, 0] = weight[:, 0].abs() + 1
    out, expected = (
        on_backend(packed_linear, "cpp")(x, pack_weight(weight), bias, out_features=70),
        linear(x, weight, bias),
    )
    for same in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(same(out), same(expected))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    require("packed_linear", "cpp")
    x, weight, bias = _draw(19, 130, 70)
    _check(layout, on_backend(packed_linear, "cpp"), lay_out(x, layout), lay_out(weight, layout), bias)


@pytest.mark.parametrize("rows", [1, 7, 20])
def test_nothing_is_written_or_read_outside(rows):
    require("packed_linear", "cpp")
    x, weight, bias = _draw(rows, 129, 33)
    packed = pack_weight(weight)
    with GuardedAllocations() as guarded:
        out = on_backend(packed_linear, "cpp")(x, packed, bias, out_features=33)
    guarded.check()
    torch.testing.assert_close(out, linear(x, weight, bias), rtol=2e-2, atol=2e-2)


def test_threads_compilation_and_registration():
    require("packed_linear", "cpp")
    x, weight, bias = _draw(9, 700, 4500)
    packed = pack_weight(weight)

    def run(x):
        return packed_linear(x, packed, bias, out_features=4500, activation="gelu_tanh")

    out, threads = run(x), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(x), out)
    finally:
        torch.set_num_threads(threads)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), out)
    opcheck("packed_linear", (x, packed, bias, torch.randn(9, 4500).bfloat16(), 1, 4500))
    layer = PackedLinear(packed, bias, out_features=4500, activation="gelu_tanh")
    assert torch.equal(layer(x), out)
    assert torch.equal(layer(x.view(3, 3, 700)), out.view(3, 3, 4500))
    assert layer(x[:0]).shape == (0, 4500)


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa):
    require("packed_linear", "cpp")
    code = (
        "import torch\nfrom lmvae_fast.kernels.packed_linear import pack_weight, packed_linear\n"
        "torch.manual_seed(0)\n"
        "for m, k, n in ((1, 5, 3), (7, 130, 33), (32, 768, 100), (129, 257, 64)):\n"
        "    x, w, b = (torch.randn(*s).bfloat16() for s in ((m, k), (n, k), (n,)))\n"
        "    truth = torch.nn.functional.linear(x.double(), w.double(), b.double())\n"
        "    y = packed_linear(x, pack_weight(w), b, out_features=n)\n"
        "    torch.testing.assert_close(y.double(), truth, rtol=2.0 ** -8, atol=1e-3)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "LMVAE_CPU_ISA": isa})


def test_bad_input_is_named():
    x, weight, bias = _draw(4, 40, 40)
    packed = pack_weight(weight)
    with raises_naming(ValueError, "x", "[4, 32]", "packed", "ceil(K / 32)"):
        packed_linear(x[:, :32], packed, bias, out_features=40)
    with raises_naming(TypeError, "packed", "bfloat16", "float32"):
        packed_linear(x.float(), packed, bias.float(), out_features=40)
    with raises_naming(TypeError, "bias", "float32"):
        packed_linear(x, packed, bias.float(), out_features=40)


def test_rows_are_chosen_by_the_nearest_instruction_set_that_was_measured():
    table = {"avx2": {"float32": 5}, "avx512_bf16": {"float32": 7, "bfloat16": 9}}
    assert choices.rows_of(table, "amx", "float32") == 7
    assert choices.rows_of(table, "avx512_vnni", "float32") == 5
    assert choices.rows_of(table, "avx512_vnni", "bfloat16") == 0
    assert choices.rows_of(table, "default", "float32") == 0


def test_the_table_has_rows_for_both_dtypes_everywhere():
    table = choices.table()
    assert set(table) <= set(choices.LADDER)
    for name in choices.LADDER:
        assert all(choices.rows_of(table, name, dtype) > 0 for dtype in ("float32", "bfloat16"))
