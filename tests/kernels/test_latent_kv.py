"""latent_kv against its reference: values, gradients, caches, dropout, layouts, bad input, on every backend."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels import philox
from lmvae_fast.kernels.backend import backend
from lmvae_fast.kernels.latent_kv import latent_kv, reference

from .common import (
    GuardedAllocations,
    assert_deterministic,
    assert_fullgraph_equal,
    assert_int64_addresses,
    assert_op_within_error_rule,
    assert_within_error_rule,
    lay_out,
    on_backend,
    opcheck,
    require,
)

FAST = ("cpp", "triton")
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
SEED = 0x1234_5678_9ABC_DEF0

# (L, B, Hkv, M, D, nz)
SHAPES = (
    (1, 1, 1, 1, 1, 1),  # a single element: every block is a tail
    (2, 2, 1, 5, 2, 5),  # rows of a group are 10: not a multiple of a Philox block of four
    (1, 5, 2, 3, 17, 31),  # primes and one less than a warp
    (1, 17, 1, 2, 31, 17),  # batch one above a vector of 16 lanes and a tensor-core block
    (1, 33, 2, 1, 127, 2),  # batch one above two vectors, rows one below a chunk pair, nz below a vector
    (1, 3, 1, 2, 128, 129),  # whole chunks; nz a tile and one element
    (1, 2, 1, 1, 130, 130),  # a chunk pair and a tail
    (1, 65, 1, 1, 80, 16),  # batch one above the largest block; head_dim not a multiple of 64
    (1, 7, 1, 1, 257, 64),  # a prime above 256
)


def plain(z, weight, bias=None, *, dropout=0.0, seed=None, dtype=None):
    """The reference behind the op's face."""
    pair = philox.seed_tensor(seed, z.device) if dropout > 0.0 else None
    return reference.latent_kv(z, weight, bias, dropout, pair, dtype or weight.dtype)


def inputs(shape, dtype=torch.float32, layout="dense", bias=True):
    layers, batch, heads, slots, dim, nz = shape
    made = [torch.randn(batch, nz), torch.randn(layers, 2, heads, slots, dim, nz) / nz**0.5]
    if bias:
        made.append(torch.randn(layers, 2, heads, slots, dim))
    return [lay_out(x.to(dtype), layout) for x in made]


def check(name, arguments, **kwargs):
    names = ("z", "weight", "bias")[: len(arguments)]
    assert_op_within_error_rule(on_backend(latent_kv, name), plain, arguments, ("memory",), names, **kwargs)


def test_reference_against_loops():
    z, weight, bias = inputs((2, 3, 2, 2, 3, 4), torch.float64)
    memory = plain(z, weight, bias)
    for layer in range(2):
        for side in range(2):
            for b in range(3):
                for head in range(2):
                    for slot in range(2):
                        for d in range(3):
                            want = bias[layer, side, head, slot, d] + sum(
                                weight[layer, side, head, slot, d, k] * z[b, k] for k in range(4)
                            )
                            torch.testing.assert_close(memory[layer, side, b, head, slot, d], want)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize(("dim", "nz"), [(1, 16), (31, 48), (130, 128)])
def test_few_latents(dtype, batch, dim, nz):
    require("latent_kv", "cpp", dtype)
    check("cpp", inputs((2, batch, 2, 3, dim, nz), dtype), dropout=0.3, seed=SEED)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_memory_of_a_latent_does_not_depend_on_those_beside_it(dtype):
    """A sentence's text is the same in whatever batch it is decoded."""
    require("latent_kv", "cpp", dtype)
    z, weight, bias = inputs((2, 70, 2, 3, 40, 64), dtype)
    with backend("cpp"):
        whole = latent_kv(z, weight, bias)
        for count in (1, 2, 7, 16, 17, 33):
            assert torch.equal(latent_kv(z[5 : 5 + count], weight, bias), whole[:, :, 5 : 5 + count]), count


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_rule_at_odd_sizes(name, dtype, shape):
    require("latent_kv", name, dtype)
    check(name, inputs(shape, dtype))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("shape", SHAPES[1:5])
def test_without_bias(name, shape):
    require("latent_kv", name)
    check(name, inputs(shape, bias=False))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("shape", SHAPES[1:5])
def test_dropout_and_its_gradients(name, dtype, shape):
    require("latent_kv", name, dtype)
    check(name, inputs(shape, dtype), dropout=0.3, seed=SEED)


@pytest.mark.parametrize("name", ["reference", *FAST])
def test_dropout_mask_is_a_function_of_seed_and_index(name):
    require("latent_kv", name)
    z, weight, _ = inputs((2, 4, 2, 5, 8, 16))
    with backend(name):
        plain_memory = latent_kv(z, weight)
        dropped = latent_kv(z, weight, dropout=0.25, seed=torch.tensor([5, 9]))
    keep = reference.keep_mask(dropped.shape, 0.25, torch.tensor([5, 9]))
    assert torch.equal(dropped != 0, keep)
    assert 0.7 < keep.double().mean() < 0.8
    torch.testing.assert_close(dropped, torch.where(keep, plain_memory / 0.75, 0.0))


def test_masks_do_not_depend_on_those_drawn_before():
    """The last masks are kept as bits, in rows of whole words."""
    require("latent_kv", "cpp")
    shapes = [(1, batch, heads, 3, dim, 4) for batch in (1, 3) for heads, dim in ((1, 1), (1, 21), (3, 7), (2, 32))]
    for shape in (*shapes, *shapes):
        z, weight, bias = inputs(shape)
        for seed in (0, 1, 0):
            with backend("cpp"):
                memory = latent_kv(z, weight, bias, dropout=0.4, seed=seed)
            assert torch.equal(memory != 0, reference.keep_mask(memory.shape, 0.4, torch.tensor([seed, 0])))


def test_a_mask_that_is_no_longer_kept_is_drawn_again():
    require("latent_kv", "cpp")
    z, weight, bias = inputs((1, 64, 1, 1024, 64, 1))  # 1 MB of bits
    with backend("cpp"):
        first = latent_kv(z, weight, bias, dropout=0.4, seed=0)
        for seed in range(1, 40):
            assert not torch.equal(latent_kv(z, weight, bias, dropout=0.4, seed=seed), first)
        assert torch.equal(latent_kv(z, weight, bias, dropout=0.4, seed=0), first)


@pytest.mark.parametrize("name", ["reference", *FAST])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_parts_of_a_batch_have_the_masks_and_gradients_of_the_whole(name, world):
    """Every world-th sentence, with the numbers that say so: memory and gradients of one call over all five."""
    require("latent_kv", name)
    whole = [x.requires_grad_() for x in inputs((2, 5, 2, 3, 5, 7))]
    z, weight, bias = (x.detach().clone().requires_grad_() for x in whole)
    with backend(name):
        memory = latent_kv(*whole, dropout=0.4, seed=torch.tensor([5, 9]))
        factor = torch.randn_like(memory)
        (memory * factor).sum().backward()
        for rank in range(world):
            part = slice(rank, None, world)
            found = latent_kv(z[part], weight, bias, dropout=0.4, seed=torch.tensor([5, 9, rank, world, 5]))
            torch.testing.assert_close(found, memory[:, :, part], rtol=1e-5, atol=1e-6)
            (found * factor[:, :, part]).sum().backward()
    for mine, want in zip((z, weight, bias), whole, strict=True):
        torch.testing.assert_close(mine.grad, want.grad, rtol=1e-5, atol=1e-5)


def test_dropout_noise_comes_from_torchs_generator():
    z, weight, _ = inputs((1, 4, 2, 5, 8, 16))
    draws = []
    for manual in (3, 3, 4):
        torch.manual_seed(manual)
        draws += [latent_kv(z, weight, dropout=0.5), latent_kv(z, weight, dropout=0.5)]
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[4])


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("layout", ["column_slice", "row_step", "transposed", "offset", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(name, layout, dtype):
    require("latent_kv", name, dtype)
    check(name, inputs((3, 6, 2, 3, 5, 37), dtype, layout))


@pytest.mark.parametrize("name", FAST)
def test_expanded_gradient(name):
    require("latent_kv", name)
    z, weight, bias = (x.requires_grad_() for x in inputs((2, 6, 2, 3, 5, 37)))
    with backend(name):
        ours = torch.autograd.grad(latent_kv(z, weight, bias).sum(), (z, weight, bias))
    for a, b in zip(ours, torch.autograd.grad(plain(z, weight, bias).sum(), (z, weight, bias)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_the_gradients_asked_for(name, wanted):
    require("latent_kv", name)
    leaves = [x.requires_grad_(w) for x, w in zip(inputs((2, 6, 2, 3, 5, 37)), wanted, strict=True)]
    asked = [x for x in leaves if x.requires_grad]
    with backend(name):
        ours = torch.autograd.grad(latent_kv(*leaves).square().sum(), asked)
    for a, b in zip(ours, torch.autograd.grad(plain(*leaves).square().sum(), asked), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reference", *FAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, 80])
def test_out_writes_its_slots_and_nothing_else(name, dtype, dim):
    """The three visibilities' caches: slots first, every second position, one slot at a time; a subset of the batch."""
    require("latent_kv", name, torch.float32)
    layers, batch, heads, slots, nz = 2, 5, 3, 4, 16
    z, weight, bias = inputs((layers, batch, heads, slots, dim, nz))
    want = plain(z, weight, bias)
    views = {
        "prefix": lambda cache: cache[:, :, :batch, :, :slots],
        "interleaved": lambda cache: cache[:, :, :batch, :, 0 : 2 * slots : 2],
        "rows": lambda cache: cache[:, :, 1 : 2 * batch : 2, :, 3 : 3 + slots],
    }
    for where, view in views.items():
        cache = torch.full((layers, 2, 2 * batch + 1, heads, 2 * slots + 3, dim), 7.0, dtype=dtype)
        with backend(name):
            given = view(cache)
            assert latent_kv(z, weight, bias, out=given) is given
        torch.testing.assert_close(given.float(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        expected = torch.full_like(cache, 7.0)
        view(expected).copy_(given)
        assert torch.equal(cache, expected), where
    rolling = torch.full((layers, 2, batch, heads, slots + 2, dim), 7.0, dtype=dtype)
    for i in range(slots):
        with backend(name):
            latent_kv(z, weight[:, :, :, i : i + 1], bias[:, :, :, i : i + 1], out=rolling[:, :, :, :, i + 1 : i + 2])
    torch.testing.assert_close(rolling[:, :, :, :, 1:-1].float(), want, rtol=1e-2, atol=1e-2)
    assert (rolling[:, :, :, :, [0, -1]] == 7).all()


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("memory", HALF_AND_SINGLE)
@pytest.mark.parametrize("weight", HALF_AND_SINGLE)
def test_memory_in_another_dtype(name, weight, memory):
    require("latent_kv", name, weight)
    check(name, inputs((2, 6, 2, 3, 5, 37), weight), dtype=memory)


@pytest.mark.parametrize("name", FAST)
def test_autocast_keeps_the_master_weight(name):
    require("latent_kv", name)
    z, weight, bias = inputs((2, 6, 2, 3, 5, 37))
    with backend(name), torch.autocast("cpu", torch.bfloat16):
        memory = latent_kv(z.bfloat16(), weight, bias)
    assert memory.dtype == torch.bfloat16
    half = plain(z.bfloat16(), weight.bfloat16(), bias.bfloat16())
    truth = plain(z.bfloat16().double(), weight.double(), bias.double())
    assert_within_error_rule("memory", memory, half, truth)


# ---- what every op must stand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reference", "cpp"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(name, dropout):
    require("latent_kv", name, torch.float64)
    arguments = [x.requires_grad_() for x in inputs((1, 3, 2, 2, 5, 3), torch.float64)]
    with backend(name):
        assert torch.autograd.gradcheck(lambda *a: latent_kv(*a, dropout=dropout, seed=3), arguments)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("shape", [(2, 0, 2, 3, 4, 5), (0, 2, 2, 3, 4, 5), (1, 2, 2, 0, 4, 5)])
def test_empty(name, shape):
    require("latent_kv", name)
    leaves = [x.requires_grad_() for x in inputs(shape)]
    with backend(name):
        memory = latent_kv(*leaves, dropout=0.5, seed=1)
        grads = torch.autograd.grad(memory.sum(), leaves)
    assert memory.shape == (shape[0], 2, *shape[1:5])
    for leaf, grad in zip(leaves, grads, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("name", FAST)
def test_guards_and_unwritten_memory(name):
    require("latent_kv", name)
    for shape in SHAPES if name == "cpp" else SHAPES[:6]:  # the others take the interpreter long, for no other tail
        leaves = [x.requires_grad_() for x in inputs(shape)]
        with backend(name), GuardedAllocations() as guarded:
            memory = latent_kv(*leaves, dropout=0.2, seed=1)
            grads = torch.autograd.grad(memory, leaves, torch.ones_like(memory))
        guarded.check()
        assert all(x.isfinite().all() for x in (memory, *grads))


@pytest.mark.parametrize("name", FAST)
def test_large_values_inf_and_nan_pass_through(name):
    require("latent_kv", name)
    z, weight, bias = inputs((1, 9, 2, 3, 5, 37))
    z[0] *= 1e4
    z[1, 3] = float("inf")
    z[2, 4] = float("nan")
    weight[0, 1, 1, 2, 3, 5] = float("-inf")
    bias[0, 0, 1, 2, 3] = float("nan")
    check(name, [z, weight, bias])


@pytest.mark.parametrize("name", FAST)
def test_deterministic_on_any_number_of_threads(name):
    require("latent_kv", name)
    shape = (2, 33, 2, 6, 64, 48) if name == "cpp" else (1, 5, 2, 3, 17, 31)
    assert_deterministic(on_backend(latent_kv, name), inputs(shape), dropout=0.1, seed=SEED)


def test_fullgraph_equality():
    assert_fullgraph_equal(latent_kv, inputs((2, 6, 2, 3, 5, 37)), dropout=0.1, seed=torch.tensor([1, 2]))


def test_fullgraph_out():
    z, weight, bias = inputs((2, 6, 2, 3, 5, 37))
    cache = torch.zeros(2, 2, 6, 2, 8, 5)

    def write(z, cache):
        latent_kv(z, weight, bias, out=cache[:, :, :, :, 0:6:2])
        return cache + 1

    with torch.no_grad():
        torch._dynamo.reset()
        got = torch.compile(write, fullgraph=True, backend="aot_eager")(z, cache)
    torch.testing.assert_close(got[:, :, :, :, 0:6:2], plain(z, weight, bias) + 1)
    torch.testing.assert_close(cache[:, :, :, :, 0:6:2], plain(z, weight, bias))


@pytest.mark.parametrize("name", FAST)
def test_opcheck(name):
    require("latent_kv", name)
    z, weight, bias = (x.requires_grad_() for x in inputs((2, 3, 2, 3, 5, 7)))
    seed = torch.tensor([1, 2])
    opcheck("latent_kv_fwd", (z, weight, bias, 0.1, seed, torch.float32), name)
    opcheck("latent_kv_fwd", (z, weight, None, 0.0, None, torch.bfloat16), name)
    z, weight, bias = z.detach(), weight.detach(), bias.detach()
    opcheck("latent_kv_out", (z, weight, bias, 0.0, None, torch.zeros(2, 2, 3, 2, 3, 5)), name)
    grad = torch.randn(2, 2, 3, 2, 3, 5)
    opcheck("latent_kv_bwd", (grad, z, weight, 0.1, seed, True, True, True), name)


@pytest.mark.parametrize("isa", ["default", "avx2"])
def test_older_instruction_sets(isa):
    """The C++ of older CPUs, in a process of its own: the choice is made once."""
    require("latent_kv", "cpp")
    if isa == "avx2" and not torch.cpu._is_avx2_supported():
        pytest.skip("this CPU has no AVX2")
    import os
    import subprocess
    import sys

    code = (
        "import torch; from tests.kernels import test_latent_kv as t; torch.manual_seed(0);"
        f"assert torch.ops.lmvae_fast.cpu_isa() == '{isa}';"
        "[t.check('cpp', t.inputs(s, d)) for s in t.SHAPES for d in (torch.float32, torch.bfloat16)];"
        "t.check('cpp', t.inputs(t.SHAPES[3]), dropout=0.3, seed=1)"
    )
    environment = {**os.environ, "LMVAE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_static_address_arithmetic():
    triton_module = pytest.importorskip("lmvae_fast.kernels.latent_kv.triton_kernels")
    assert_int64_addresses(triton_module)
