"""A flow's plan read back: every stage with the places of its numbers, as csrc/cpu/coupling_flow.cpp reads it.

`FlowSpec.plan` writes the integers and the numbers; this is the one place in Python that takes them apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from .codes import Permutation


@dataclass
class Layer:
    """One linear layer: its widths, and where its weight [fan_in, fan_out] and bias lie in theta."""

    fan_in: int
    fan_out: int
    weight: int
    bias: int


@dataclass
class Net:
    """One subnet: the number of its activation, and its first column in the stage's raw output [s | t]."""

    activation: int
    column: int
    layers: list[Layer] = field(default_factory=list)


@dataclass
class StageLayout:
    """One stage: its halves as (first channel, width), its kinds by number (codes.py), and where its numbers lie."""

    nets: list[Net] = field(default_factory=list)
    active: int = 0
    active_width: int = 0
    passive: int = 0
    passive_width: int = 0
    squash: int = 0
    conditional: bool = False
    reals: int = 0  # place of clamp and gain among the plan's floats
    clamp: float = 0.0
    gain: float = 0.0
    affine: int = 0
    scale: int = 0
    offset: int = 0
    prepared: int = 0
    permutation: int = 0
    index: int = 0
    matrix: int = 0

    @property
    def hidden(self) -> int:
        """Columns of hidden activations."""
        return sum(layer.fan_out for net in self.nets for layer in net.layers[:-1])


class _Reader:
    """Takes the integers of a plan apart, and counts how far the stages have come in every flat tensor."""

    def __init__(self, ints: Sequence[int]) -> None:
        self.dim, self.cond_dim = ints[:2]
        self.ints, self.at, self.reals_at = ints, 2, 0
        self.theta = self.constants = self.indices = self.prepared = 0

    def next(self) -> int:
        self.at += 1
        return self.ints[self.at - 1]

    def stages(self) -> list[StageLayout]:
        found: list[StageLayout] = []
        while self.at < len(self.ints):
            repeat, period = self.next(), self.next()
            unit = self.at, self.reals_at
            for _ in range(repeat):
                self.at, self.reals_at = unit
                found += [self.stage() for _ in range(period)]
        return found

    def stage(self) -> StageLayout:
        s = StageLayout()
        if self.next():
            self.coupling(s)
        s.affine, s.permutation = self.next(), self.next()
        if s.affine:
            s.scale, s.offset, s.prepared = self.theta, self.theta + self.dim, self.prepared
            self.theta += 2 * self.dim
            self.prepared += self.dim
        if s.permutation == Permutation.HARD:
            s.index = self.indices
            self.indices += 2 * self.dim
        if s.permutation == Permutation.SOFT:
            s.matrix = self.constants
            self.constants += 2 * self.dim * self.dim + 1
        return s

    def coupling(self, s: StageLayout) -> None:
        split, active, s.squash, conditional, nets = (self.next() for _ in range(5))
        s.conditional = bool(conditional)
        halves = [(0, split), (split, self.dim - split)]
        (s.active, s.active_width), (s.passive, s.passive_width) = halves[active], halves[1 - active]
        s.reals = self.reals_at
        self.reals_at += 2
        for n in range(nets):
            net = Net(self.next(), n * s.active_width)
            inputs = s.passive_width + (self.cond_dim if s.conditional else 0)
            widths = [inputs, *(self.next() for _ in range(self.next()))]
            widths.append(s.active_width * (2 if nets == 1 else 1))
            for a, b in itertools.pairwise(widths):
                net.layers.append(Layer(a, b, self.theta, self.theta + a * b))
                self.theta += a * b + b
            s.nets.append(net)


@lru_cache(maxsize=64)
def _read(ints: tuple[int, ...]) -> tuple[StageLayout, ...]:
    return tuple(_Reader(ints).stages())


@lru_cache(maxsize=64)
def read_plan(ints: tuple[int, ...], floats: tuple[float, ...]) -> tuple[StageLayout, ...]:
    """The stages of a plan, with offsets into theta, constants, indices and the prepared scales."""
    return tuple(replace(s, clamp=floats[s.reals], gain=floats[s.reals + 1]) if s.nets else s for s in _read(ints))


def saved_columns(ints: Sequence[int]) -> int:
    """Numbers per row that memory="save" keeps: of each stage its input, the subnets' output and hidden activations."""
    return sum(ints[0] + 2 * s.active_width + s.hidden for s in _read(tuple(ints)))
