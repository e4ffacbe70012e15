"""The one random stream: against its definition in plain integers, the same bits in C++ and Triton, and statistically."""

from __future__ import annotations

import math

import pytest
import torch

from lmvae_fast.kernels import backend, philox

from .common import ODD_SIZES, raises_naming

SEEDS = (
    (0, 0),
    (1, 2**32 + 5),  # an offset whose high word counts
    (-1, -1),  # all bits set in seed and offset
    (0x1234_5678_9ABC_DEF0, 7),
)

cpp = pytest.mark.skipif(not backend.extension()[0], reason=f"no C++ extension: {backend.extension()[1]}")


def pair(seed):
    return torch.tensor(seed, dtype=torch.int64)


def scalar_philox(counter, key):
    """Philox4x32-10 in Python's own integers, word for word after Salmon et al. 2011, section 3.3."""
    c, k, mask = list(counter), list(key), 2**32 - 1
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def test_known_answers():
    """The vectors published with Random123 (kat_vectors, philox4x32 10)."""
    assert scalar_philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 2**32 - 1
    assert scalar_philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("seed", SEEDS)
def test_words_follow_the_definition(seed):
    rows, cols = 3, 6
    words = philox.words(pair(seed), rows, cols)
    s, o = (x % 2**64 for x in seed)
    for row in range(rows):
        for col in range(cols):
            block = row * 2 + col // 4
            counter = [block, 0, o % 2**32, o >> 32]
            assert words[row, col] == scalar_philox(counter, [s % 2**32, s >> 32])[col % 4]


@cpp
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cols", ODD_SIZES)
def test_cpp_gives_the_same_words_and_normals(seed, cols):
    words = torch.ops.lmvae_fast.philox_words(pair(seed), 5, cols)
    assert torch.equal(words.long() & 0xFFFFFFFF, philox.words(pair(seed), 5, cols))
    normal = torch.ops.lmvae_fast.philox_normal(pair(seed), 5, cols)
    torch.testing.assert_close(
        normal.double(), philox.normal(pair(seed), (5, cols), torch.float64), rtol=4e-7, atol=1e-9
    )


def test_triton_gives_the_same_words_and_normals():
    triton = pytest.importorskip("triton")
    if not backend.INTERPRET:
        pytest.skip("Triton's interpreter is off")
    from .stream_kernel import stream_kernel

    rows, cols = 5, 16
    for seed in SEEDS:
        words, normal = torch.empty(rows, cols, dtype=torch.int32), torch.empty(rows, cols)
        stream_kernel[(1,)](pair(seed), words, normal, ROWS=triton.next_power_of_2(rows), LAST=rows, QUADS=cols // 4)
        assert torch.equal(words.long() & 0xFFFFFFFF, philox.words(pair(seed), rows, cols))
        truth = philox.normal(pair(seed), (rows, cols), torch.float64)
        torch.testing.assert_close(normal.double(), truth, rtol=4e-7, atol=1e-9)


def test_an_element_does_not_depend_on_how_many_rows_there_are():
    assert torch.equal(philox.words(pair((3, 4)), 9, 7)[:2], philox.words(pair((3, 4)), 2, 7))


def test_single_rows_can_be_taken_from_the_stream():
    whole, which = philox.normal(pair((3, 4)), (9, 7)), torch.tensor([8, 0, 3, 3])
    assert torch.equal(philox.normal(pair((3, 4)), (4, 7), which=which), whole[which])
    far = torch.tensor([2**40])  # past 32 bits of the block's number
    assert not torch.equal(philox.normal(pair((3, 4)), (1, 7), which=far), whole[:1])


def test_normals_are_normal():
    """Mean, variance, skewness, kurtosis and lag-1 correlation of 2^20 draws, each within five standard errors."""
    x = philox.normal(pair((11, 0)), (1024, 1024), torch.float64).flatten()
    n = x.numel()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert abs((x[1:] * x[:-1]).mean()) < 5 / math.sqrt(n)


def test_dropout_keeps_the_asked_share_and_keeps_all_at_zero():
    mask = philox.keep_mask(pair((5, 0)), (1000, 1000), 0.1)
    assert abs(mask.double().mean() - 0.9) < 5 * math.sqrt(0.09 / 1e6)
    assert philox.keep_mask(pair((5, 0)), (100, 100), 0.0).all()
    with raises_naming(ValueError, "dropout", 1.0):
        philox.dropout_threshold(1.0)


def test_seeds_come_from_torchs_generator():
    torch.manual_seed(3)
    first, second = philox.seed_tensor(None, "cpu"), philox.seed_tensor(None, "cpu")
    torch.manual_seed(3)
    assert torch.equal(first, philox.seed_tensor(None, "cpu"))
    assert not torch.equal(first, second)
    assert philox.seed_tensor(2**64 - 1, "cpu").tolist() == [-1, 0]
    assert philox.seed_tensor(5, "cpu").tolist() == [5, 0]


@pytest.mark.parametrize("bad", [torch.zeros(3, dtype=torch.int64), torch.zeros(2)])
def test_seed_tensors_of_another_form_are_refused(bad):
    with raises_naming(ValueError, "seed", list(bad.shape), bad.dtype):
        philox.seed_tensor(bad, "cpu")


@pytest.mark.parametrize("bad", [1.5, True, 2**64])
def test_seeds_that_are_no_64_bit_integers_are_refused(bad):
    with raises_naming(TypeError, "seed", bad):
        philox.seed_tensor(bad, "cpu")
