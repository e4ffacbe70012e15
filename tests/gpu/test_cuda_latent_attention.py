"""latent_attention's Triton kernels on a CUDA device: forward, backward, decode."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.backend import backend
from lmvae_fast.kernels.latent_attention import flash, latent_attention, latent_attention_decode
from lmvae_fast.kernels.latent_attention.visibility import VISIBILITIES
from tests.kernels import test_latent_attention as on_cpu
from tests.kernels.common import (
    LAYOUTS,
    GuardedAllocations,
    assert_deterministic,
    assert_fullgraph_equal,
    assert_op_within_error_rule,
    assert_within_error_rule,
    lay_out,
)
from tests.kernels.test_latent_attention import NAMES, attend, inputs
from tests.kernels.test_latent_attention_decode import plain as plain_decode

from .common import (
    DTYPES,
    assert_no_host_sync,
    assert_replays,
    assert_same_far_apart,
    capture,
    cuda,
    far_apart,
    no_host_sync,
    triton,
)

pytestmark = pytest.mark.gpu
op, decode = triton(attend), triton(latent_attention_decode)


def make(lengths, layout="dense", **kwargs):
    tensors, cu_seqlens = inputs(lengths, **kwargs)
    return cuda(tensors, layout), cu_seqlens.cuda()


def plain(*tensors, **kwargs):
    with torch.device("cuda"):  # where its masks are made
        return on_cpu.plain(*tensors, **kwargs)


def options(tensors, cu_seqlens, visibility="prefix", **kwargs):
    return dict(cu_seqlens=cu_seqlens, visibility=visibility, scale=tensors[0].shape[-1] ** -0.5) | kwargs


def check(tensors, cu_seqlens, visibility="prefix", **kwargs):
    named = NAMES[: len(tensors)]
    assert_op_within_error_rule(
        op, plain, tensors, ("out",), named, **options(tensors, cu_seqlens, visibility, **kwargs)
    )


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("window", [None, 1, 2, 6])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_rules_windows_and_soft_caps(visibility, window, softcap):
    tensors, cu = make([3, 1, 0, 9], heads=4)
    check(tensors, cu, visibility, window=window, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_error_rule_in_every_dtype(dtype, visibility):
    tensors, cu = make([4, 17, 2, 33], heads=4, head_dim=64, slots=33, dtype=dtype)
    check(tensors, cu, visibility)
    check(tensors, cu, visibility, max_seqlen=33)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 17, 32, 80, 127, 128, 130, 256])
def test_head_dims(dtype, head_dim):
    tensors, cu = make([5, 2, 19], head_dim=head_dim, slots=20, dtype=dtype)
    check(tensors, cu, "interleaved")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 16, 17, 31, 65, 129, 257, 1000])
@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_lengths(dtype, length, visibility):
    """One block and many: the two forms of the backward."""
    tensors, cu = make([length, 3], heads=1, kv_heads=1, head_dim=32, slots=max(3, length), dtype=dtype)
    check(tensors, cu, visibility)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (5, 1), (14, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups(dtype, heads):
    tensors, cu = make([7, 40], heads=heads[0], kv_heads=heads[1], slots=40, dtype=dtype)
    check(tensors, cu, "rolling")


@pytest.mark.parametrize("slots", [None, 1, 5, 65])
def test_slots(slots):
    tensors, cu = make([6, 70], slots=slots)
    check(tensors, cu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_size_of_gpt2(dtype):
    lengths = [4 + i * 7 % 19 for i in range(32)]
    tensors, cu = make(lengths, heads=12, kv_heads=12, head_dim=64, slots=33, dtype=dtype)
    for visibility in VISIBILITIES:
        check(tensors, cu, visibility, max_seqlen=max(lengths))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(layout, dtype):
    tensors, cu = make([5, 2, 9], layout, heads=4, head_dim=20, dtype=dtype)
    check(tensors, cu, "interleaved")


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 3, 0]])
def test_empty_sentences_and_batches(lengths):
    tensors, cu = make(lengths)
    leaves = [x.requires_grad_() for x in tensors]
    out = op(*leaves, **options(tensors, cu))
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(grad.isfinite().all() and grad.shape == x.shape for grad, x in zip(grads, leaves, strict=True))
    if lengths == [0]:
        assert all((grad == 0).all() for grad in grads)


def test_extreme_scores_inf_and_nan():
    tensors, cu = make([4, 9, 3])
    tensors[0][5] *= 1e4
    tensors[1][2, 0, 3] = float("inf")
    tensors[2][7, 1, 2] = float("nan")
    check(tensors, cu)


def test_small_writes_stay_inside_their_buffers():
    for dtype in (torch.float32, torch.bfloat16):
        for lengths in ([3, 1, 0, 9], [70, 5]):
            tensors, cu = make(lengths, heads=4, head_dim=20, slots=max(lengths), dtype=dtype)
            leaves = [x.requires_grad_() for x in tensors]
            with GuardedAllocations() as guards:
                out = op(*leaves, **options(tensors, cu, "interleaved"))
                grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
            guards.check()
            assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_run_to_run(dtype):
    for lengths in ([7, 20, 4], [300, 2]):
        tensors, cu = make(lengths, heads=4, head_dim=64, slots=33, dtype=dtype)
        assert_deterministic(op, tensors, **options(tensors, cu))


@pytest.mark.parametrize("max_seqlen", [None, 9])
def test_no_host_synchronisation(max_seqlen):
    tensors, cu = make([3, 1, 0, 9])
    assert_no_host_sync(op, tensors, **options(tensors, cu, max_seqlen=max_seqlen))


def test_fullgraph_compile_gives_the_same():
    tensors, cu = make([3, 9])
    assert_fullgraph_equal(attend, tensors, compiler="inductor", **options(tensors, cu, max_seqlen=9))


def test_graph_replays_on_new_values():
    tensors, cu = make([3, 9])
    assert_replays(op, tensors, **options(tensors, cu, "rolling", max_seqlen=9))


def test_large_inputs_far_apart(card):
    tensors, cu = make([3, 30, 9], heads=4, slots=30, dtype=torch.bfloat16)
    assert_same_far_apart(op, tensors, range(5), card, **options(tensors, cu, "interleaved"))


# ---- decode ----------------------------------------------------------------------------------------------------------


def decode_inputs(batch=5, heads=4, kv_heads=2, positions=70, head_dim=64, dtype=torch.float32, layout="dense"):
    q = torch.randn(batch, heads, head_dim).to(dtype)
    caches = [torch.randn(batch, kv_heads, positions, head_dim).to(dtype) for _ in range(2)]
    lengths = torch.tensor([0, 1, positions, 33, 17])[torch.arange(batch) % 5]
    return cuda([q, *caches], layout), lengths.cuda()


def check_decode(tensors, lengths, **kwargs):
    kwargs["scale"] = tensors[0].shape[-1] ** -0.5
    truth = plain_decode(*(x.double() for x in tensors), lengths, **kwargs)
    assert_within_error_rule(
        "out", decode(*tensors, lengths, **kwargs), plain_decode(*tensors, lengths, **kwargs), truth
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (7, 1)])
@pytest.mark.parametrize("head_dim", [17, 64, 128, 256])
def test_decode(dtype, heads, head_dim):
    check_decode(*decode_inputs(heads=heads[0], kv_heads=heads[1], head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (7, 1)])
@pytest.mark.parametrize("kwargs", [{}, {"window": 1100, "softcap": 2.0}])
def test_decode_split_along_a_long_cache(dtype, heads, kwargs):
    check_decode(*decode_inputs(heads=heads[0], kv_heads=heads[1], positions=1500, dtype=dtype), **kwargs)


@pytest.mark.parametrize("window", [1, 5, 40])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_decode_windows_and_soft_caps(window, softcap):
    check_decode(*decode_inputs(), window=window, softcap=softcap)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_any_layout(layout):
    check_decode(*decode_inputs(layout=layout, dtype=torch.bfloat16))


def test_decode_never_uses_what_lies_beyond_the_lengths():
    tensors, lengths = decode_inputs()
    clean = decode(*tensors, lengths, scale=0.125)
    for cache in tensors[1:]:
        for row, length in enumerate(lengths.tolist()):
            cache[row, :, length:] = float("nan")
    assert torch.equal(decode(*tensors, lengths, scale=0.125), clean)
    assert (clean[0] == 0).all()


@pytest.mark.parametrize("positions", [70, 1500])  # whole, and split along the cache
def test_decode_waits_for_nothing_and_replays_with_other_lengths(positions):
    tensors, lengths = decode_inputs(positions=positions)
    decode(*tensors, lengths, scale=0.125)
    with no_host_sync():
        decode(*tensors, lengths, scale=0.125)
    graph, out = capture(lambda: decode(*tensors, lengths, scale=0.125))
    lengths.copy_(torch.tensor([5, positions, 2, 0, 64]))
    graph.replay()
    assert torch.equal(out, decode(*tensors, lengths, scale=0.125))


def test_small_decode_writes_stay_inside_their_buffers():
    for head_dim in (17, 64):
        tensors, lengths = decode_inputs(head_dim=head_dim, dtype=torch.bfloat16)
        with GuardedAllocations() as guards:
            out = decode(*tensors, lengths, scale=0.125)
        guards.check()
        assert out.isfinite().all()


def test_large_cache_far_apart(card):
    (q, *caches), lengths = decode_inputs(dtype=torch.bfloat16)
    near = decode(q, *caches, lengths, scale=0.125)
    spread = [far_apart(x, card // 2) for x in caches]
    assert torch.equal(decode(q, *spread, lengths, scale=0.125), near)
    assert torch.equal(decode(lay_out(q, "row_step"), *caches, lengths, scale=0.125), near)


@pytest.mark.parametrize("window", [None, 40])
def test_flash_attention_is_the_same_function(window):
    tensors, cu_seqlens = make([70, 3, 129], heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16, slots=5)
    reason = flash.reason_against(
        tensors[0], 64, visibility="prefix", max_seqlen=129, softcap=None, sinks=False, graded=False, forced=True
    )
    if reason is not None:
        pytest.skip(reason)
    call = options(tensors, cu_seqlens, window=window, max_seqlen=129)
    with torch.no_grad(), backend("flash"):
        out = latent_attention(*tensors, **call)
    call.pop("max_seqlen")
    with torch.no_grad():
        exact = plain(*[x.double() for x in tensors], **call)
        assert_within_error_rule("out", out, plain(*tensors, **call), exact)
