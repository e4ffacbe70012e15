"""Packing: every sentence once, the same plan from the same (seed, epoch), similar lengths together."""

import numpy as np
import pytest

from lmvae_fast.errors import DataError
from lmvae_fast.training.batch_plan import permutation, plan_epoch, sorted_batches, steps_per_epoch


def flat(plan):
    return np.concatenate([rows for step in plan.steps for rows in step])


# fewer than one batch, exact multiples, remainders at each level, one window and many
@pytest.mark.parametrize("count", [1, 7, 8, 64, 65, 1000])
@pytest.mark.parametrize(("batch_size", "accumulation", "bucket"), [(8, 1, 4), (4, 2, 1), (3, 3, 100), (1, 1, 16)])
def test_every_sentence_once(count, batch_size, accumulation, bucket):
    lengths = np.random.default_rng(count).integers(1, 30, count)
    options = {"seed": 3, "epoch": 2, "accumulation": accumulation, "bucket_batches": bucket}
    plan = plan_epoch(lengths, batch_size, **options)
    assert sorted(flat(plan)) == list(range(count))
    assert len(plan) == steps_per_epoch(count, batch_size, accumulation)
    sizes = [sum(map(len, step)) for step in plan.steps]
    assert all(size == batch_size * accumulation for size in sorted(sizes)[1:])
    assert all(1 <= len(rows) <= batch_size for step in plan.steps for rows in step)
    assert np.array_equal(flat(plan), flat(plan_epoch(list(lengths), batch_size, **options)))


def test_seed_and_epoch_change_the_order():
    lengths = np.ones(500, np.int64)
    plans = {(s, e): tuple(flat(plan_epoch(lengths, 10, seed=s, epoch=e))) for s in range(3) for e in range(3)}
    assert len(set(plans.values())) == 9


def test_the_order_is_pinned():
    """A new version must not change it: resumed runs of older checkpoints would see other data."""
    assert permutation(10, 0, 0, 0).tolist() == [2, 0, 4, 9, 3, 8, 1, 7, 5, 6]
    assert permutation(5, 2**70 + 1, 3).tolist() == permutation(5, 2**70 % 2**64 + 1, 3).tolist()


def test_permutation_is_uniform_enough():
    """Each value at each place about equally often (chi-square of 6 x 6 cells over 3000 permutations, 25 degrees)."""
    counts = np.zeros((6, 6))
    for key in range(3000):
        counts[np.arange(6), permutation(6, 11, key)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 60


def test_micro_batches_split_the_same_steps():
    lengths = np.random.default_rng(0).integers(1, 30, 203)
    whole = plan_epoch(lengths, 12, seed=0, epoch=0)
    parts = plan_epoch(lengths, 4, seed=0, epoch=0, accumulation=3)
    for one, many in zip(whole.steps, parts.steps, strict=True):
        assert np.array_equal(one[0], np.concatenate(many))


def test_lengths_are_bucketed():
    """The spread of lengths within a batch is far below that of shuffled batches."""
    lengths = np.random.default_rng(0).integers(1, 100, 2000)
    plan = plan_epoch(lengths, 20, seed=0, epoch=0, bucket_batches=16)
    spread = np.mean([np.ptp(lengths[step[0]]) for step in plan.steps])
    shuffled = plan_epoch(lengths, 20, seed=0, epoch=0, bucket_batches=1)
    assert spread < 10
    assert np.mean([np.ptp(lengths[step[0]]) for step in shuffled.steps]) > 70


def test_nothing_to_plan():
    with pytest.raises(DataError, match="no sentence left"):
        plan_epoch([], 4, seed=0, epoch=0)


def test_sorted_batches_start_with_the_longest():
    batches = sorted_batches([3, 9, 1, 9, 5], 2)
    assert [list(rows) for rows in batches] == [[1, 3], [4, 0], [2]]
