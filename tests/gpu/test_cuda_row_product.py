"""row_product's Triton kernels on a CUDA device: values, and kernels that begin while the one before them ends."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.backend import choose
from lmvae_fast.kernels.latent_attention import latent_attention_step
from lmvae_fast.kernels.row_product import MOST_ROWS, Norm, row_product
from tests.kernels.common import LAYOUTS, ODD_SIZES, GuardedAllocations, lay_out
from tests.kernels.test_row_product import held, make

from .common import DTYPES, capture, no_host_sync, triton

pytestmark = pytest.mark.gpu
op, attend = triton(row_product), triton(latent_attention_step)


def _given(*sizes, **options):
    """`make`'s arguments on the device."""
    given, options = make(*sizes, **options)
    if options.get("norm") is not None:
        weight, bias, *rest = options["norm"]
        options["norm"] = Norm(weight.cuda(), None if bias is None else bias.cuda(), *rest)
    if options["added"] is not None:
        options["added"] = options["added"].cuda()
    return tuple(None if x is None else x.cuda() for x in given), options


def test_triton_is_what_a_cuda_tensor_gets():
    for dtype in DTYPES:
        assert choose("row_product", torch.zeros(1, 1, device="cuda", dtype=dtype)) == "triton"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, MOST_ROWS, 17])
def test_products_of_real_layers(dtype, rows):
    torch.manual_seed(0)
    for inputs, outputs, norm, activation in (
        (768, 2304, "layer", None), (768, 768, None, None), (768, 3072, "layer", "gelu_tanh"), (3072, 768, None, None),
        (576, 3072, "rms", "swiglu"), (2048, 4096, "rms", "geglu_tanh"), (11008, 512, None, None), (5120, 64, "rms", None),
    ):  # fmt: skip
        given, options = _given(rows, inputs, outputs, dtype, norm=norm, activation=activation)
        for settled in (False, True):
            held(op(*given, **options, settled=settled), given, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ODD_SIZES[1:])
def test_odd_sizes(dtype, size):
    torch.manual_seed(0)
    for rows, inputs, outputs in ((2, size, 6), (2, 6, size), (min(size, 40), 70, 6)):
        given, options = _given(rows, inputs, outputs, dtype, norm="layer")
        held(op(*given, **options), given, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [3, 9])
def test_any_layout(layout, rows):
    torch.manual_seed(0)
    (x, weight, bias), options = _given(rows, 33, 21, torch.bfloat16, norm="rms")
    given = lay_out(x, layout), lay_out(weight, layout), bias
    held(op(*given, **options), given, options)


def _chain(x, layers):
    """Products of which each reads what the one before has just written."""
    for weight, norm in layers:
        x = op(x, weight, norm=norm, added=x, settled=True)
    return x


@pytest.mark.parametrize("rows", [1, 4, MOST_ROWS])
def test_a_chain_of_kernels_that_begin_early_waits_for_every_link(rows):
    """A hundred links, launched and from a graph, give bit by bit what they give where each waits for the end of all."""
    torch.manual_seed(0)
    layers = []
    for _ in range(100):
        (_, weight, _), options = _given(rows, 768, 768, torch.bfloat16, norm="rms")
        layers.append((weight, options["norm"]))
    x = torch.randn(rows, 768, device="cuda", dtype=torch.bfloat16)

    def slowly(x):
        for weight, norm in layers:
            x = op(x, weight, norm=norm, added=x)
            torch.cuda.synchronize()
        return x

    expected = slowly(x)
    for _ in range(20):
        assert torch.equal(_chain(x, layers), expected)
    graph, out = capture(lambda: _chain(x, layers))
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, slowly(x))


@pytest.mark.parametrize("kv_heads", [12, 4])
@pytest.mark.parametrize("rows", [1, MOST_ROWS])
def test_attention_between_such_kernels_waits_too(rows, kv_heads):
    """Layers as a decoding step has them: every one reads what the kernel before has just written, and writes to its cache."""
    torch.manual_seed(0)
    heads, dim, positions, count = 12, 64, 40, 24
    layers = []
    for _ in range(count):
        (_, into, _), options = _given(rows, heads * dim, (heads + 2 * kv_heads) * dim, torch.bfloat16, norm="rms")
        (_, out, _), _ = _given(rows, heads * dim, heads * dim, torch.bfloat16)
        layers.append((into, options["norm"], out))
    caches = torch.randn(count, 2, rows, kv_heads, positions, dim, device="cuda", dtype=torch.bfloat16)
    places = torch.arange(rows, device="cuda") % positions
    x = torch.randn(rows, heads * dim, device="cuda", dtype=torch.bfloat16)

    def settle(wait):
        if wait:
            torch.cuda.synchronize()

    def step(x, caches, wait):
        for (into, norm, out), (keys, values) in zip(layers, caches, strict=True):
            parts = op(x, into, norm=norm, settled=not wait).view(rows, -1, dim).split([heads, kv_heads, kv_heads], 1)
            settle(wait)
            seen = attend(*parts, keys, values, places, places + 1, scale=dim**-0.5).view(rows, -1)
            settle(wait)
            x = op(seen, out, added=x, settled=not wait)
            settle(wait)
        return x

    slow, fast = caches.clone(), caches.clone()
    expected = step(x, slow, True)
    for _ in range(20):
        fast.copy_(caches)
        assert torch.equal(step(x, fast, False), expected) and torch.equal(fast, slow)
    graph, found = capture(lambda: step(x, fast, False))
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        fast.copy_(caches)
        slow.copy_(caches)
        graph.replay()
        assert torch.equal(found, step(x, slow, True)) and torch.equal(fast, slow)


def test_a_weight_that_a_running_kernel_writes_is_waited_for_unless_it_is_said_to_be_settled():
    torch.manual_seed(0)
    (x, weight, bias), options = _given(1, 4096, 8192, torch.bfloat16, norm="rms")
    options["added"] = None
    for _ in range(20):
        new = torch.randn_like(weight) / 64
        torch.cuda.synchronize()
        weight.copy_(new)
        found = op(x, weight, bias, **options)
        torch.cuda.synchronize()
        assert torch.equal(found, op(x, weight, bias, **options))


def test_the_host_does_not_wait():
    given, options = _given(3, 768, 3072, torch.bfloat16, norm="layer", activation="gelu_tanh")
    op(*given, **options)
    with no_host_sync():
        op(*given, **options)


@pytest.mark.parametrize("rows", [3, MOST_ROWS])
def test_nothing_is_written_or_read_outside(rows):
    given, options = _given(rows, 129, 37, torch.bfloat16, norm="layer")
    with GuardedAllocations() as guarded:
        found = op(*given, **options)
    guarded.check()
    held(found, given, options)
