"""Schedules against independent definitions of them."""

import math

import pytest
import torch

from lmvae_fast.config import TrainConfig
from lmvae_fast.errors import ConfigError
from lmvae_fast.training.schedule import (
    Plateau,
    beta_at,
    cyclical_beta,
    improves,
    langvae_total_steps,
    learning_rate_factor,
)


def published_cyclical(total, cycles, zero, increase, beta):
    """The schedule as the published trainers build it: a list, filled cycle by cycle by running additions."""
    values = [beta] * total
    period = total / cycles
    for cycle in range(cycles):
        start, value, i = int(cycle * period), 0.0, 0
        while value <= beta and start + i < total:
            if i < zero * period:
                values[start + i] = 0.0
            else:
                values[start + i] = value
                value += beta / (increase * period)
            i += 1
    return values


# Whole and broken periods, more cycles than steps fit nicely, Optimus's fine-tuning shares and LangVAE's.
@pytest.mark.parametrize(("total", "cycles"), [(400, 16), (1000, 16), (97, 4), (333, 5), (50, 1), (31, 7), (20, 16)])
@pytest.mark.parametrize(("zero", "increase", "beta"), [(0.25, 0.25, 1.0), (0.5, 0.25, 1.0), (0.0, 0.5, 0.3)])
def test_cyclical_equals_the_published_list(total, cycles, zero, increase, beta):
    expected = published_cyclical(total, cycles, zero, increase, beta)
    ours = [cyclical_beta(step, total, beta=beta, cycles=cycles, zero=zero, increase=increase) for step in range(total)]
    assert ours == pytest.approx(expected, abs=1e-6)


def test_cyclical_closed_form():
    """One period of 8 steps at zero 1/4, increase 1/2: two zeros, the ramp from 0 by 1/4 a step, then the top."""
    values = [cyclical_beta(step, 16, cycles=2, zero=0.25, increase=0.5) for step in range(17)]
    period = [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert values == [*period, *period, 1]


def test_beta_at_follows_the_config():
    config = TrainConfig(beta_schedule="linear", beta=0.5, beta_zero=0.1, beta_increase=0.4, beta_cycles=9)
    values = [beta_at(step, 100, config) for step in range(100)]
    assert values[:10] == [0.0] * 10
    assert values[10:51] == pytest.approx([0.5 * i / 40 for i in range(41)])
    assert values[50:] == [0.5] * 50
    assert beta_at(3, 100, TrainConfig(beta_schedule="constant", beta=0.7)) == 0.7
    assert beta_at(0, 100, TrainConfig()) == 0.0
    with_step = TrainConfig(beta_zero=0.5, beta_increase=0.0, beta_cycles=1)
    assert [beta_at(step, 4, with_step) for step in range(4)] == [0, 0, 1, 1]


def test_langvae_counts_the_remainder_as_batches():
    assert langvae_total_steps(1000, 50, 20) == 400
    assert langvae_total_steps(1049, 50, 1) == 20 + 49


def test_learning_rate_closed_forms():
    def factors(schedule, warmup=0, total=10):
        return [learning_rate_factor(step, total, schedule=schedule, warmup=warmup) for step in range(total)]

    assert factors("constant") == [1.0] * 10
    assert factors("linear") == pytest.approx([(10 - s) / 10 for s in range(10)])
    assert factors("cosine") == pytest.approx([(1 + math.cos(math.pi * s / 10)) / 2 for s in range(10)])
    assert factors("linear", 4)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors("linear", 4)[4:] == pytest.approx([1 - i / 6 for i in range(6)])
    assert factors("plateau", 2) == [0.5, *[1.0] * 9]
    # A run that goes on past its planned end keeps the end's value, and warm-up longer than the run never divides by 0.
    assert learning_rate_factor(12, 10, schedule="linear") == 0.0
    assert learning_rate_factor(5, 3, schedule="cosine", warmup=5) == 1.0
    with pytest.raises(ConfigError, match="unknown learning-rate schedule"):
        learning_rate_factor(0, 10, schedule="sometimes")


@pytest.mark.parametrize("patience", [0, 2])
def test_plateau_equals_torchs(patience):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=patience, factor=0.5)
    ours = Plateau(patience=patience, factor=0.5)
    values = [5.0, 4.0, 4.0, 3.9999999, 4.1, 4.2, 3.0, 3.1, 3.1, 3.1, 3.1, 3.1, 3.1, 2.9, 3.0]
    for value in values:
        theirs.step(value)
        ours.update(value)
        assert ours.scale == pytest.approx(optimizer.param_groups[0]["lr"])


def test_plateau_state_survives():
    first, second = Plateau(patience=1), Plateau(patience=1)
    for value in (3.0, 3.5):
        first.update(value)
    second.load_state_dict(first.state_dict())
    for value in (3.5, 3.5, 2.0):
        assert first.update(value) == second.update(value)
        assert first.state_dict() == second.state_dict()


def test_improves():
    assert improves(5.0, None)
    assert not improves(float("nan"), None)
    assert not improves(1.0, 1.0)
    assert improves(-2.0, -1.9, 0.01)
    assert not improves(-1.9001, -1.9, 0.01)
