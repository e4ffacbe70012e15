"""The visibility rules, and latent_attention_decode: step by step over a cache it is latent_attention."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels import backend as registry
from lmvae_fast.kernels.latent_attention import latent_attention, latent_attention_decode, latent_attention_step
from lmvae_fast.kernels.latent_attention.visibility import (
    VISIBILITIES,
    slot_position,
    token_position,
    visibility_mask,
    visible_slots,
    visible_tokens,
)

from .common import (
    LAYOUTS,
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
from .test_latent_attention import ALL, FAST, HALF_AND_SINGLE, cache_at, inputs

# ---- the rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (5, 5), (8, 11)])
def test_mask_runs_and_positions_agree_with_the_cache(visibility, window, tokens, slots):
    mask = visibility_mask(tokens, slots, visibility, window)
    for i in range(tokens):
        cache = cache_at(i, slots, visibility)
        seen = set(cache if window is None else cache[-window:])
        assert set(mask[i].nonzero().flatten().tolist()) == seen
        assert set(visible_slots(i, slots, visibility, window)) == {c for c in seen if c < slots}
        assert set(visible_tokens(i, slots, visibility, window)) == {c - slots for c in seen if c >= slots}
        assert token_position(i, slots, visibility) == len(cache) - 1
        for position, column in enumerate(cache):
            if column < slots:
                assert slot_position(column, visibility, step=i) == position
    steps = torch.arange(tokens)
    assert token_position(steps, slots, visibility).tolist() == [
        token_position(i, slots, visibility) for i in range(tokens)
    ]


def test_rules_as_their_sources_word_them():
    rolling = visibility_mask(4, 4, "rolling").int().tolist()
    assert rolling == [
        [1, 0, 0, 0, 1, 0, 0, 0],  # the first token sees slot 0 and itself
        [0, 1, 0, 0, 1, 1, 0, 0],  # then slots 1..i, the token before and itself
        [0, 1, 1, 0, 0, 1, 1, 0],
        [0, 1, 1, 1, 0, 0, 1, 1],
    ]
    assert visibility_mask(2, 3, "prefix").int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert visibility_mask(2, 3, "interleaved").int().tolist() == [[1, 0, 0, 1, 0], [1, 1, 0, 1, 1]]
    with raises_naming(ValueError, "step", "rolling"):
        slot_position(1, "rolling")
    with raises_naming(ValueError, "visibility", "causal"):
        visibility_mask(2, 3, "causal")


# ---- decode -----------------------------------------------------------------------------------------------------------


def caches(batch=3, heads=4, kv_heads=2, positions=20, head_dim=16, dtype=torch.float32, layout="dense"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, head_dim), *[(batch, kv_heads, positions, head_dim)] * 2]
    return [lay_out(torch.randn(shape, generator=generator).to(dtype), layout) for shape in shapes]


def plain(q, k_cache, v_cache, lengths, *, scale, window=None, softcap=None):
    """Eager attention row by row, in the inputs' dtype."""
    group = q.shape[1] // k_cache.shape[1]
    rows = []
    for b, length in enumerate(lengths.tolist()):
        low = 0 if window is None else max(0, length - window)
        keys, values = (x[b, :, low:length].repeat_interleave(group, 0) for x in (k_cache, v_cache))
        scores = (q[b, :, None] @ keys.transpose(1, 2)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        rows.append((weights @ values)[:, 0])
    return torch.stack(rows)


def check(name, tensors, lengths, **kwargs):
    options = {"scale": tensors[0].shape[-1] ** -0.5} | kwargs
    out = on_backend(latent_attention_decode, name)(*tensors, lengths, **options)
    truth = plain(*(x.double() for x in tensors), lengths, **options)
    assert_within_error_rule("out", out, plain(*tensors, lengths, **options), truth)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("kwargs", [{}, {"window": 4}, {"softcap": 1.5}, {"window": 1, "softcap": 30.0}])
def test_decode_values(name, dtype, kwargs):
    require("latent_attention_decode", name, dtype)
    for lengths in ([1, 20, 7], torch.tensor([2, 3, 19], dtype=torch.int32)):
        check(name, caches(dtype=dtype), torch.as_tensor(lengths), **kwargs)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("head_dim", [1, 5, 17, 31, 32, 64, 127, 130, 256])  # tails of every vector
def test_decode_head_dims(name, head_dim):
    require("latent_attention_decode", name)
    check(name, caches(head_dim=head_dim), torch.tensor([1, 20, 7]))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("positions", [1, 63, 64, 65, 129])  # around the blocks of 64 keys
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 1), (14, 2)])
def test_decode_positions_and_groups(name, positions, heads):
    require("latent_attention_decode", name)
    tensors = caches(heads=heads[0], kv_heads=heads[1], positions=positions, head_dim=24)
    check(name, tensors, torch.tensor([positions, 1, (positions + 1) // 2]))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize(("heads", "kwargs"), [((2, 2), {}), ((3, 1), {"softcap": 1.5}), ((2, 1), {"window": 1030})])
def test_decode_split_along_a_long_cache(dtype, heads, kwargs):
    """Rows that fill every split, that leave splits empty, that hold one position, and none; stale values never count."""
    require("latent_attention_decode", "triton", dtype)
    pytest.importorskip("triton", reason="triton is not installed")
    from lmvae_fast.kernels.latent_attention.triton import decode_splits

    positions = 1100
    assert decode_splits(min(positions, kwargs.get("window", positions)), 4 * heads[1]) > 1
    q, k_cache, v_cache = caches(4, *heads, positions, head_dim=19, dtype=dtype)
    lengths = torch.tensor([positions, 65, 1, 0])
    for b, length in enumerate(lengths.tolist()):
        k_cache[b, :, length:], v_cache[b, :, length:] = float("nan"), float("inf")
    tensors = [x[:3] for x in (q, k_cache, v_cache)]
    check("triton", tensors, lengths[:3], **kwargs)
    run = on_backend(latent_attention_decode, "triton")
    first, again = (run(q, k_cache, v_cache, lengths, scale=0.2, **kwargs) for _ in range(2))
    assert torch.equal(first, again)
    assert (first[3] == 0).all()


def test_decode_splits_fill_the_device_and_no_more():
    pytest.importorskip("triton")
    from lmvae_fast.kernels.latent_attention.triton import decode_splits

    assert decode_splits(1023, 1) == 1
    assert decode_splits(1024, 1) == 4
    assert decode_splits(10**6, 1) == 32
    assert decode_splits(4096, 133) == 1
    for positions in (1024, 4096, 10**5):
        for pairs in (0, 1, 8, 96, 132, 1000):
            splits = decode_splits(positions, pairs)
            assert splits == 1 or splits * pairs <= 264


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_layouts(name, layout):
    require("latent_attention_decode", name)
    check(name, caches(layout=layout), torch.tensor([1, 20, 7]))


@pytest.mark.parametrize("name", ALL)
def test_decode_ignores_what_is_stale(name):
    require("latent_attention_decode", name)
    q, k_cache, v_cache = caches()
    lengths = torch.tensor([1, 13, 7])
    expected = plain(q, k_cache, v_cache, lengths, scale=0.25)
    for b, length in enumerate(lengths.tolist()):
        k_cache[b, :, length:] = float("nan")
        v_cache[b, :, length:] = float("inf")
    out = on_backend(latent_attention_decode, name)(q, k_cache, v_cache, lengths, scale=0.25)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", ALL)
def test_decode_of_nothing(name):
    require("latent_attention_decode", name)
    q, k_cache, v_cache = caches()
    out = on_backend(latent_attention_decode, name)(q, k_cache, v_cache, torch.tensor([0, 3, 0]), scale=0.25)
    assert (out[[0, 2]] == 0).all()
    assert (out[1] != 0).all()
    empty = on_backend(latent_attention_decode, name)(
        q[:0], k_cache[:0], v_cache[:0], torch.tensor([]).long(), scale=1.0
    )
    assert empty.shape == (0, 4, 16)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("window", [None, 3])
def test_steps_over_a_cache_are_the_parallel_pass(name, visibility, window):
    require("latent_attention_decode", name)
    tensors, cu = inputs([6], heads=4, slots=7)
    q, k, v, memory_k, memory_v = tensors
    options = dict(scale=0.25, window=window)
    expected = latent_attention(*tensors, cu_seqlens=cu, visibility=visibility, **options)
    k_cache, v_cache = (torch.full((1, 2, 16, 16), float("nan")) for _ in range(2))
    for i in range(6):
        at = token_position(i, 7, visibility)
        for cache, tokens, memory in ((k_cache, k, memory_k), (v_cache, v, memory_v)):
            if visibility != "prefix":  # one slot a step
                cache[0, :, slot_position(i, visibility, step=i)] = memory[0, :, i]
            elif i == 0:
                cache[0, :, :7] = memory[0]
            cache[0, :, at] = tokens[i]
        step = on_backend(latent_attention_decode, name)(
            q[i : i + 1], k_cache, v_cache, torch.tensor([at + 1]), **options
        )
        torch.testing.assert_close(step[0], expected[i])


@pytest.mark.parametrize("name", FAST)
def test_decode_writes_stay_inside(name):
    require("latent_attention_decode", name)
    with GuardedAllocations() as guarded:
        space = getattr(torch.ops, registry.namespace(name))
        for positions in (20, 1030):  # the second is split in the Triton form
            space.latent_attention_decode(
                *caches(positions=positions, head_dim=19), torch.tensor([1, 20, 7]), 0.25, None, None
            )
    guarded.check()


def test_decode_opcheck_fullgraph_and_vmap():
    require("latent_attention_decode", "cpp")
    tensors, lengths = caches(), torch.tensor([1, 20, 7])
    opcheck("latent_attention_decode", (*tensors, lengths, 0.25, 3, None))
    compiled = torch.compile(latent_attention_decode, fullgraph=True, backend="aot_eager")
    expected = latent_attention_decode(*tensors, lengths, scale=0.25)
    torch.testing.assert_close(compiled(*tensors, lengths, scale=0.25), expected, rtol=0, atol=0)
    stacked = [torch.stack([x, x]) for x in tensors]
    with raises_naming(TypeError, "latent_attention_decode", "vmap"):
        torch.func.vmap(lambda *x: latent_attention_decode(*x, lengths, scale=1.0))(*stacked)


def test_decode_addresses_are_64_bit():
    pytest.importorskip("triton")
    from lmvae_fast.kernels.latent_attention import triton_decode

    assert_int64_addresses(triton_decode)


BAD = {
    "q rank": (lambda a: a.update(q=a["q"][0]), ValueError, ("q", "rank 3")),
    "cache rank": (lambda a: a.update(k_cache=a["k_cache"][0]), ValueError, ("k_cache", "rank 4")),
    "cache shapes": (lambda a: a.update(v_cache=a["v_cache"][:, :, :5]), ValueError, ("v_cache", 20, 5)),
    "batch": (lambda a: a.update(q=a["q"][:2]), ValueError, ("k_cache", "batch 2", "(3, ")),
    "heads": (lambda a: a.update(q=a["q"][:, :3]), ValueError, ("q", 3, 2)),
    "dtype": (lambda a: a.update(v_cache=a["v_cache"].half()), TypeError, ("v_cache", "float16", "float32")),
    "lengths' size": (lambda a: a.update(lengths=a["lengths"][:2]), ValueError, ("lengths", 3, 2)),
    "lengths' dtype": (lambda a: a.update(lengths=a["lengths"].float()), TypeError, ("lengths", "float32")),
    "too long": (lambda a: a["lengths"].fill_(21), ValueError, ("lengths", 20, 21)),
    "negative": (lambda a: a["lengths"].fill_(-1), ValueError, ("lengths", 20, -1)),
    "window": (lambda a: a.update(window=0), ValueError, ("window", 0)),
    "softcap": (lambda a: a.update(softcap=float("inf")), ValueError, ("softcap", "inf")),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ALL)
def test_decode_bad_input(name, case):
    require("latent_attention_decode", name)
    spoil, error, words = BAD[case]
    arguments = dict(
        zip(("q", "k_cache", "v_cache"), caches(), strict=True), lengths=torch.tensor([1, 20, 7]), scale=1.0
    )
    on_backend(latent_attention_decode, name)(**arguments)
    spoil(arguments)
    with raises_naming(error, *words):
        on_backend(latent_attention_decode, name)(**arguments)


# ---- a step: the new token is written, then attended to ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_step_writes_then_attends(name, layout, dtype):
    require("latent_attention_decode", name, dtype)
    q, k_cache, v_cache = caches(dtype=dtype)
    k, v = (lay_out(torch.randn(3, *k_cache.shape[1::2]).to(dtype), layout) for _ in range(2))
    if layout != "expanded":  # nothing can be written to a cache whose rows are one
        k_cache, v_cache = lay_out(k_cache, layout), lay_out(v_cache, layout)
    places, lengths = torch.tensor([0, 19, 4]), torch.tensor([1, 20, 7])
    expected = [k_cache.clone(), v_cache.clone()]
    for cache, new in zip(expected, (k, v), strict=True):
        for row, place in enumerate(places.tolist()):
            cache[row, :, place] = new[row]
    options = {"scale": 0.3, "window": 6, "softcap": 4.0}
    out = on_backend(latent_attention_step, name)(q, k, v, k_cache, v_cache, places, lengths, **options)
    assert torch.equal(k_cache, expected[0])
    assert torch.equal(v_cache, expected[1])
    # Bits are asked for over the very caches that were written: torch's own product need not have the same in other strides.
    assert torch.equal(out, on_backend(latent_attention_decode, name)(q, k_cache, v_cache, lengths, **options))
    eager, truth = (
        plain(q, *expected, lengths, **options),
        plain(*(x.double() for x in (q, *expected)), lengths, **options),
    )
    assert_within_error_rule("out", out, eager, truth)


@pytest.mark.parametrize("place", [0, 700, 1199])
def test_step_of_several_programs_a_row(place):
    """All of them see the new token, whoever writes it."""
    require("latent_attention_decode", "triton")
    q, k_cache, v_cache = torch.randn(2, 4, 16), *torch.randn(2, 2, 2, 1200, 16).unbind(0)
    k, v = torch.randn(2, 2, 2, 16).unbind(0)
    places, lengths = torch.tensor([place, 3]), torch.tensor([1200, 4])
    expected = [k_cache.clone(), v_cache.clone()]
    for cache, new in zip(expected, (k, v), strict=True):
        cache[[0, 1], :, places] = new
    out = on_backend(latent_attention_step, "triton")(q, k, v, k_cache, v_cache, places, lengths, scale=0.3)
    assert torch.equal(k_cache, expected[0])
    assert torch.equal(v_cache, expected[1])
    torch.testing.assert_close(out, plain(q, *expected, lengths, scale=0.3))


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_step_is_registered_and_names_bad_input(name):
    require("latent_attention_decode", name)
    q, k_cache, v_cache = caches()
    k, v = torch.randn(2, 3, *k_cache.shape[1::2]).unbind(0)
    places, lengths = torch.tensor([0, 19, 4]), torch.tensor([1, 20, 7])
    opcheck("latent_attention_step", (q, k, v, k_cache, v_cache, places, lengths, 0.3, None, None), name)

    def run(k=k, v=v, places=places):
        return on_backend(latent_attention_step, name)(q, k, v, k_cache, v_cache, places, lengths, scale=0.3)

    with raises_naming(ValueError, "k must be", "[2, "):
        run(k=k[:2])
    with raises_naming(TypeError, "v is torch.float64", "k_cache"):
        run(v=v.double())
    with raises_naming(TypeError, "positions"):
        run(places=places.float())
    for bad in (-1, 20):
        with raises_naming(ValueError, "positions must be 0 to 19", str(bad), "row 1"):
            run(places=torch.tensor([0, bad, 4]))


@pytest.mark.parametrize("case", ["step-bf16-64-group1", "step-fp32-64-group1-split"])
def test_a_step_that_begins_early_reads_nothing_before_it_waits(case):
    """Any of its inputs may be what the kernel before it writes; the one behind it may begin as soon as it has waited."""
    require("latent_attention_decode", "triton")
    before, after = compiled_code("latent_attention", f"{case}-dependent").split("griddepcontrol.wait", 1)
    assert "ld.global" not in before and "st.global" not in before
    early, late = after.split("griddepcontrol.launch_dependents", 1)
    assert "ld.global" not in early and "ld.global" in late
