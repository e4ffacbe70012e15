"""packed_linear: the product with a weight packed once equals torch's linear."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import gelu, linear, silu

from lmvae_fast.kernels.packed_linear import choices, pack_gated, pack_weight, packed_linear

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
    return torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)


def _check(name, function, x, weight, bias):
    out = function(x, pack_weight(weight), bias, out_features=weight.shape[0])
    truth = linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_within_error_rule(name, out, linear(x, weight, bias), truth)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("rows", [*ODD_SIZES, 11, 12, 13, 24, 25])  # around a register tile of 12 rows
def test_rows(name, rows):
    require("packed_linear", name)
    _check(f"{rows} rows", on_backend(packed_linear, name), *_draw(rows, 200, 96))


@pytest.mark.parametrize("rows", [4, 6, 7, 8, 11])  # as many sums in registers as fit: what splits them differs
def test_sums_round_no_more_than_torchs_whatever_is_drawn(rows):
    require("packed_linear", "cpp")
    for inputs in (200, 511):
        for seed in range(15):
            torch.manual_seed(seed)
            _check(f"{rows} rows, seed {seed}", on_backend(packed_linear, "cpp"), *_draw(rows, inputs, 96))


@pytest.mark.parametrize("inputs", [32, 64, 800])  # steps of 32 depths, an odd number of them
@pytest.mark.parametrize("rows", [24, 25, 31, 32, 33, 48, 49, 64, 128, 129, 161])  # blocks of 32 rows, and half of one
def test_rows_on_tiles(rows, inputs):
    require("packed_linear", "cpp")
    _check(f"{rows} rows", on_backend(packed_linear, "cpp"), *_draw(rows, inputs, 70))


# Many groups of panels, of one block of rows and of two; several chunks of the depth; several passes, each of chunks; groups
# whose sums wait for the last chunk.
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(30, 64, 700), (40, 800, 1100), (96, 3072, 70), (257, 1024, 130), (256, 1024, 1100)]
)
def test_large_products_on_tiles(rows, inputs, outputs):
    require("packed_linear", "cpp")
    x, weight, bias = _draw(rows, inputs, outputs)
    function = on_backend(packed_linear, "cpp")
    _check(f"{rows} rows", function, x, weight, bias)
    if choices.instruction_set() != "amx":
        return
    few, all_rows = (function(part, pack_weight(weight), bias, out_features=outputs) for part in (x[-30:], x))
    assert torch.equal(few, all_rows[-30:])  # on tiles a row's sums do not depend on the rows beside it


@pytest.mark.parametrize("spread", [1e-12, 1e12])
def test_uneven_magnitudes_on_tiles(spread):
    require("packed_linear", "cpp")
    x, weight, bias = _draw(32, 256, 64)
    x, weight = x * spread ** torch.rand(32, 256), weight * spread ** torch.rand(64, 1)
    _check("spread", on_backend(packed_linear, "cpp"), x, weight, bias)


@pytest.mark.parametrize("rows", [40, 300])  # more than the vector units take at a time
@pytest.mark.parametrize("outputs", [64, 70])
def test_numbers_that_cannot_be_taken_apart(outputs, rows):
    require("packed_linear", "cpp")
    x, weight, bias = _draw(rows, 64, outputs)
    x[-2, 1] = float("inf")
    x[3, 5], x[13, 0], weight[7, 9], weight[60, 1] = float("nan"), float("inf"), -float("inf"), 3.4e38
    weight[:, 0] = weight[:, 0].abs() + 1
    out = on_backend(packed_linear, "cpp")(x, pack_weight(weight), bias, out_features=outputs)
    expected = linear(x, weight, bias)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isposinf(), expected.isposinf())
    assert torch.equal(out.isneginf(), expected.isneginf())
    finite = expected.isfinite()
    torch.testing.assert_close(out[finite], expected[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("outputs", ODD_SIZES)
def test_outputs(name, outputs):
    require("packed_linear", name)
    _check(f"{outputs} outputs", on_backend(packed_linear, name), *_draw(33, 300, outputs))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("inputs", [*ODD_SIZES, 3072])
def test_inputs(name, inputs):
    require("packed_linear", name)
    x, weight, _ = _draw(32, inputs, 64)
    _check(f"{inputs} inputs", on_backend(packed_linear, name), x, weight, None)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("added", [False, True])
def test_activation_and_residual(name, added):
    require("packed_linear", name)
    x, weight, bias = _draw(21, 200, 70)
    residual = torch.randn(21, 70) if added else None

    def plain(x, weight, bias, residual):
        y = gelu(linear(x, weight, bias), approximate="tanh")
        return y if residual is None else y + residual

    out = on_backend(packed_linear, name)(
        x, pack_weight(weight), bias, out_features=70, activation="gelu_tanh", residual=residual
    )
    double = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    assert_within_error_rule("gelu", out, plain(x, weight, bias, residual), plain(*double))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("outputs", ODD_SIZES)
@pytest.mark.parametrize("added", [False, True])
def test_gated(name, outputs, added):
    require("packed_linear", name)
    # torch takes one output, or two, as dot products, in many sums that are shorter than ours
    inputs = 20 if outputs <= 2 else 150
    x, gate, up = torch.randn(13, inputs), torch.randn(outputs, inputs) / 12, torch.randn(outputs, inputs)
    residual = torch.randn(13, outputs) if added else None

    def plain(x, gate, up, residual):
        y = silu(linear(x, gate)) * linear(x, up)
        return y if residual is None else y + residual

    out = on_backend(packed_linear, name)(
        x, pack_gated(gate, up), out_features=outputs, activation="swiglu", residual=residual
    )
    double = [None if t is None else t.double() for t in (x, gate, up, residual)]
    assert_within_error_rule(f"{outputs} outputs", out, plain(x, gate, up, residual), plain(*double))


def test_activations_of_large_values():
    require("packed_linear", "cpp")
    x = torch.tensor([[-1e30, -100.0, -10.0, -0.0, 1e-20, 10.0, 100.0, 1e30]]).t().contiguous()
    out = on_backend(packed_linear, "cpp")(x, pack_weight(torch.ones(1, 1)), out_features=1, activation="gelu_tanh")
    torch.testing.assert_close(out, gelu(x.double(), approximate="tanh").float(), rtol=2e-6, atol=1e-7)
    gated = on_backend(packed_linear, "cpp")(
        x, pack_gated(torch.ones(1, 1), torch.full((1, 1), 0.5)), out_features=1, activation="swiglu"
    )
    torch.testing.assert_close(gated, (silu(x.double()) * 0.5 * x.double()).float(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    require("packed_linear", "cpp")
    x, weight, bias = _draw(19, 130, 70)
    _check(layout, on_backend(packed_linear, "cpp"), lay_out(x, layout), lay_out(weight, layout), bias)


def test_nothing_is_written_or_read_outside():
    require("packed_linear", "cpp")
    x, weight, bias = _draw(7, 129, 33)
    packed = pack_weight(weight)
    with GuardedAllocations() as guarded:
        out = on_backend(packed_linear, "cpp")(x, packed, bias, out_features=33)
    guarded.check()
    torch.testing.assert_close(out, linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_leading_dimensions_and_no_rows():
    require("packed_linear", "cpp")
    x, weight, bias = torch.randn(2, 3, 40), torch.randn(50, 40), torch.randn(50)
    out = packed_linear(x, pack_weight(weight), bias, out_features=50)
    torch.testing.assert_close(out, linear(x, weight, bias), rtol=1e-4, atol=1e-5)
    assert packed_linear(x[:0], pack_weight(weight), bias, out_features=50).shape == (0, 3, 50)


def test_nan_and_inf_stay_in_their_rows():
    require("packed_linear", "cpp")
    x, weight, _ = _draw(14, 64, 40)
    x[3, 5], x[13, 0] = float("nan"), float("inf")
    out = on_backend(packed_linear, "cpp")(x, pack_weight(weight), None, out_features=40)
    assert out[3].isnan().all()
    assert not out[13].isfinite().any()
    assert out[[r for r in range(14) if r not in (3, 13)]].isfinite().all()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(40, 96, 1100), (200, 2048, 1100)])
def test_panels_taken_in_turn_give_the_same_bits(rows, inputs, outputs):
    require("packed_linear", "cpp")
    threads = torch.get_num_threads()
    x, weight, _ = _draw(rows, inputs, outputs)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(packed_linear(x.to(dtype), pack_weight(weight.to(dtype)), None, out_features=outputs))
            assert all(torch.equal(one, found[0]) for one in found)
    finally:
        torch.set_num_threads(threads)


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
    opcheck("packed_linear", (x, packed, bias, torch.randn(9, 4500), 1, 4500))


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set(isa):
    require("packed_linear", "cpp")
    code = (
        "import torch\nfrom lmvae_fast.kernels.packed_linear import pack_weight, packed_linear\n"
        "torch.manual_seed(0)\n"
        "for m, k, n in ((1, 5, 3), (7, 130, 33), (32, 768, 100), (129, 257, 64)):\n"
        "    x, w, b = torch.randn(m, k), torch.randn(n, k), torch.randn(n)\n"
        "    y = packed_linear(x, pack_weight(w), b, out_features=n)\n"
        "    torch.testing.assert_close(y, torch.nn.functional.linear(x, w, b), rtol=1e-4, atol=1e-4)\n"
        "    y = packed_linear(x, pack_weight(w), b, out_features=n, activation='gelu_tanh', residual=y)\n"
        "    z = torch.nn.functional.linear(x, w, b)\n"
        "    z = z + torch.nn.functional.gelu(z, approximate='tanh')\n"
        "    torch.testing.assert_close(y, z, rtol=1e-4, atol=2e-4)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "LMVAE_CPU_ISA": isa})


def test_bad_input_is_named():
    x, weight, bias = _draw(4, 16, 40)
    packed = pack_weight(weight)
    with raises_naming(ValueError, "weight", "[4]"):
        pack_weight(torch.randn(4))
    with raises_naming(TypeError, "weight", "int64"):
        pack_weight(torch.ones(4, 4, dtype=torch.int64))
    with raises_naming(ValueError, "x", "[4, 15]", "packed"):
        packed_linear(x[:, :15], packed, bias, out_features=40)
    with raises_naming(ValueError, "out_features", "65", "2 panels"):
        packed_linear(x, packed, None, out_features=65)
    with raises_naming(ValueError, "bias", "[40]", "[39]"):
        packed_linear(x, packed, bias, out_features=39)
    with raises_naming(TypeError, "packed", "float64"):
        packed_linear(x, packed.double(), None, out_features=40)
    with raises_naming(ValueError, "activation", "relu", "swiglu"):
        packed_linear(x, packed, out_features=40, activation="relu")
    with raises_naming(ValueError, "bias", "None with swiglu"):
        packed_linear(x, pack_gated(weight, weight), bias, out_features=40, activation="swiglu")
    with raises_naming(ValueError, "residual", "[4, 40]", "[4, 39]"):
        packed_linear(x, packed, bias, out_features=40, residual=torch.zeros(4, 39))
    with raises_naming(ValueError, "gate", "up", "[39, 16]"):
        pack_gated(weight, weight[:39])
    with raises_naming(ValueError, "gradient"):
        packed_linear(x.requires_grad_(), packed, None, out_features=40)


@pytest.mark.parametrize(
    ("here", "table", "expected"),
    [
        ("avx512_bf16", {"avx512_bf16": {"float32 training": "packed"}}, "packed"),
        ("amx", {"avx512_bf16": {"float32 training": "packed"}}, "packed"),  # the next one below that was measured
        (
            "amx",
            {"avx512_bf16": {"float32 training": "onednn"}, "amx": {"float32": 1024}},
            "packed",
        ),  # its own rows say so
        ("amx", {"avx512_bf16": {"float32 training": "onednn"}, "amx": {"float32": 48}}, "onednn"),
        ("avx512", {"avx512_bf16": {"float32 training": "packed"}}, "onednn"),  # nobody measured it
    ],
)
def test_what_multiplies_a_training_batch_comes_from_the_table(monkeypatch, here, table, expected):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN here")
    for name, value in (("_known", lambda: True), ("instruction_set", lambda: here), ("table", lambda: table)):
        monkeypatch.setattr(choices, name, value)
    assert choices.training_product.__wrapped__(torch.float32) == expected
