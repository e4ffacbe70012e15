"""What a coupling flow is made of, as data: the shape of every stage and where its numbers lie.

A flow is a sequence of *stages*; each stage does, in this order and each part optional,

    affine coupling  ->  per-channel affine (the global scale of AllInOne, or ActNorm)  ->  permutation of the channels.

Any FrEIA sequence of AllInOne, GLOW, RNVP, ActNorm and PermuteRandom modules is such a sequence (GLOW and RNVP blocks are
two stages, one per half). The numbers themselves live in three flat tensors (`FlowParams`): one pointer for a kernel that
streams the weights, one gradient to write, reduce or clip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch

from .codes import Activation, Permutation, Scale, Squash, names

ACTIVATIONS, SQUASHES, SCALES, PERMUTATIONS = map(names, (Activation, Squash, Scale, Permutation))
MAX_DIM = 1024


@dataclass(frozen=True)
class Subnet:
    """An MLP: Linear, activation, Linear, ..., Linear. `hidden` may be empty (one Linear). GELU is the exact (erf) one."""

    hidden: tuple[int, ...] = (512,)
    activation: str = "relu"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {self.activation!r}")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden widths must be positive, got {self.hidden}")


@dataclass(frozen=True)
class Coupling:
    """One half of the channels rescales and shifts the other.

    Channels [0, split) and [split, dim) are the two halves; `active` (0 or 1) says which one changes; the other one, with
    the condition behind it when `conditional`, is the input of the subnets. With one subnet its output is [s | t]; with two
    (RNVP) the first gives s and the second t. Then, with raw = gain * s:

        log_scale = clamp * squash(raw),   y_active = x_active * exp(log_scale) + gain * t,   logdet += sum(log_scale)

    squash: "tanh"; "atan", that is 0.636 * atan (GLOW's default in FrEIA); "sigmoid", that is 2 * sigmoid - 1; "none", the
    number itself, so that clamp is a factor and nothing bounds the log-scale (the coupling of arXiv 2305.01713, clamp 1).
    AllInOne has gain 0.1 and tanh, GLOW and RNVP gain 1.
    """

    split: int
    active: int
    subnets: tuple[Subnet, ...]
    clamp: float = 2.0
    squash: str = "tanh"
    gain: float = 0.1
    conditional: bool = False

    def __post_init__(self) -> None:
        if self.active not in (0, 1):
            raise ValueError(f"active must be 0 (first half) or 1 (second half), got {self.active}")
        if len(self.subnets) not in (1, 2):
            raise ValueError(f"subnets must hold one net (s and t jointly) or two (s, t), got {len(self.subnets)}")
        if not (math.isfinite(self.clamp) and self.clamp > 0):
            raise ValueError(f"clamp must be a finite number > 0, got {self.clamp}")
        if not (math.isfinite(self.gain) and self.gain != 0):
            raise ValueError(f"gain must be a finite number other than 0, got {self.gain}")
        if self.squash not in SQUASHES:
            raise ValueError(f"squash must be one of {SQUASHES}, got {self.squash!r}")


@dataclass(frozen=True)
class Stage:
    """coupling -> affine -> permutation, each optional.

    affine: how the raw per-channel parameter gives the scale: "softplus" 0.1 * softplus(raw, beta=0.5) and "sigmoid"
    10 * sigmoid(raw - 2) as in AllInOne, "exp" as in ActNorm; y = x * scale + offset. permutation: "hard" (an index) or
    "soft" (any fixed invertible matrix).
    """

    coupling: Coupling | None = None
    affine: str | None = None
    permutation: str | None = None

    def __post_init__(self) -> None:
        if self.affine not in (None, *SCALES):
            raise ValueError(f"affine must be None or one of {SCALES}, got {self.affine!r}")
        if self.permutation not in (None, *PERMUTATIONS):
            raise ValueError(f"permutation must be None, 'hard' or 'soft', got {self.permutation!r}")


@dataclass(frozen=True)
class Slot:
    """One named array inside a flat tensor. Weights are stored input-major, [in, out]: the forward reads them as they lie."""

    name: str
    offset: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.offset : self.offset + self.numel].view(self.shape)


@dataclass(frozen=True)
class FlowSpec:
    """The static description of a flow over `dim` channels (2 to 1024), conditioned on `cond_dim` numbers (0: none).

    `slots` says where everything lies, `sizes` how many elements (theta, constants, indices) have, and `plan` is what the
    compiled kernels read of it.
    """

    dim: int
    cond_dim: int
    stages: tuple[Stage, ...]
    # Made at once and not when first asked for, so that a call of a new flow can be traced.
    slots: tuple[tuple[Slot, ...], tuple[Slot, ...], tuple[Slot, ...]] = field(init=False, repr=False, compare=False)
    sizes: tuple[int, int, int] = field(init=False, repr=False, compare=False)
    plan: tuple[list[int], list[float]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 2 <= self.dim <= MAX_DIM:
            raise ValueError(f"dim must be between 2 and {MAX_DIM}, got {self.dim}")
        if self.cond_dim < 0:
            raise ValueError(f"cond_dim must be >= 0, got {self.cond_dim}")
        for i, stage in enumerate(self.stages):
            if stage.coupling is None:
                continue
            if not 0 < stage.coupling.split < self.dim:
                raise ValueError(f"stage {i}: split must lie inside (0, dim={self.dim}), got {stage.coupling.split}")
            if stage.coupling.conditional and self.cond_dim == 0:
                raise ValueError(f"stage {i}: the coupling is conditional but cond_dim is 0")
        slots = self._slots()
        object.__setattr__(self, "slots", slots)
        object.__setattr__(self, "sizes", tuple(s[-1].offset + s[-1].numel if s else 0 for s in slots))
        object.__setattr__(self, "plan", self._plan())

    def active(self, coupling: Coupling) -> tuple[int, int]:
        """(first channel, width) of the half that changes."""
        return (0, coupling.split) if coupling.active == 0 else (coupling.split, self.dim - coupling.split)

    def passive(self, coupling: Coupling) -> tuple[int, int]:
        """(first channel, width) of the half that is read."""
        return (coupling.split, self.dim - coupling.split) if coupling.active == 0 else (0, coupling.split)

    def layers(self, coupling: Coupling) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """For each subnet, its index and the (in, out) widths of its linear layers."""
        inputs = self.passive(coupling)[1] + (self.cond_dim if coupling.conditional else 0)
        outputs = self.active(coupling)[1] * (2 if len(coupling.subnets) == 1 else 1)
        for n, subnet in enumerate(coupling.subnets):
            widths = [inputs, *subnet.hidden, outputs]
            yield n, list(pairwise(widths))

    def _slots(self) -> tuple[tuple[Slot, ...], tuple[Slot, ...], tuple[Slot, ...]]:
        """Where everything lies in (theta, constants, indices), stage by stage, in this order:

        theta: per subnet and layer `weight` [in, out] and `bias` [out]; then `scale` [dim] and `offset` [dim] of the affine;
        constants: of a soft permutation `matrix` [dim, dim] (y = u @ matrix), `inverse` [dim, dim], `logdet` [1];
        indices: of a hard permutation `index` [dim] (y[j] = u[index[j]]) and `inverse` [dim].
        """
        theta: list[Slot] = []
        constants: list[Slot] = []
        indices: list[Slot] = []

        def put(slots: list[Slot], name: str, *shape: int) -> None:
            offset = slots[-1].offset + slots[-1].numel if slots else 0
            slots.append(Slot(name, offset, shape))

        for i, stage in enumerate(self.stages):
            if stage.coupling is not None:
                for n, widths in self.layers(stage.coupling):
                    for k, (fan_in, fan_out) in enumerate(widths):
                        put(theta, f"stages.{i}.subnets.{n}.{k}.weight", fan_in, fan_out)
                        put(theta, f"stages.{i}.subnets.{n}.{k}.bias", fan_out)
            if stage.affine is not None:
                put(theta, f"stages.{i}.scale", self.dim)
                put(theta, f"stages.{i}.offset", self.dim)
            if stage.permutation == "soft":
                put(constants, f"stages.{i}.matrix", self.dim, self.dim)
                put(constants, f"stages.{i}.inverse", self.dim, self.dim)
                put(constants, f"stages.{i}.logdet", 1)
            if stage.permutation == "hard":
                put(indices, f"stages.{i}.index", self.dim)
                put(indices, f"stages.{i}.inverse", self.dim)
        return tuple(theta), tuple(constants), tuple(indices)

    def _plan(self) -> tuple[list[int], list[float]]:
        """The spec as the integers and the numbers that the compiled kernels read.

        Runs of equal blocks are written once with a count: a call should not pay for parsing ten equal blocks.
        ints: dim, cond_dim, then groups (repeat, stages in the group, stages); a stage is has_coupling, [split, active,
        squash, conditional, subnets, per subnet (activation, hidden layers, widths...)], affine, permutation, where the
        names are numbered as in codes.py and 0 means none. floats: clamp, gain of each coupling. plan.py reads it.
        """
        ints, floats = [self.dim, self.cond_dim], []
        i = 0
        while i < len(self.stages):
            period, repeat = _best_run(self.stages, i)
            ints += [repeat, period]
            for stage in self.stages[i : i + period]:
                ints += _encode(stage)
                if stage.coupling is not None:
                    floats += [float(stage.coupling.clamp), float(stage.coupling.gain)]
            i += period * repeat
        return ints, floats


@lru_cache(maxsize=64)
def spec_of_plan(ints: tuple[int, ...], floats: tuple[float, ...]) -> FlowSpec:
    """The spec whose `plan` this is."""
    numbers, reals = iter(ints), iter(floats)
    dim, cond_dim = next(numbers), next(numbers)

    def stage() -> Stage:
        coupling = None
        if next(numbers):
            split, active, squash, conditional, count = (next(numbers) for _ in range(5))
            nets = []
            for _ in range(count):
                activation = ACTIVATIONS[next(numbers) - 1]
                nets.append(Subnet(tuple(next(numbers) for _ in range(next(numbers))), activation))
            clamp, gain = next(reals), next(reals)
            coupling = Coupling(split, active, tuple(nets), clamp, SQUASHES[squash - 1], gain, bool(conditional))
        affine, permutation = next(numbers), next(numbers)
        return Stage(coupling, SCALES[affine - 1] if affine else None, (None, "hard", "soft")[permutation])

    stages: list[Stage] = []
    for repeat in numbers:
        stages += [stage() for _ in range(next(numbers))] * repeat
    return FlowSpec(dim, cond_dim, tuple(stages))


def _best_run(stages: tuple[Stage, ...], start: int) -> tuple[int, int]:
    """(period, repeats) of the run from `start` that covers the most stages; ties go to the shorter period."""
    best = (1, 1)
    for period in (1, 2, 3, 4):
        if start + period > len(stages):
            break
        unit, repeat = stages[start : start + period], 1
        while stages[start + period * repeat : start + period * (repeat + 1)] == unit:
            repeat += 1
        if repeat > 1 and period * repeat > best[0] * best[1]:
            best = (period, repeat)
    return best


def _encode(stage: Stage) -> list[int]:
    ints = [0]
    if stage.coupling is not None:
        c = stage.coupling
        ints = [1, c.split, c.active, int(Squash[c.squash.upper()]), int(c.conditional), len(c.subnets)]
        for subnet in c.subnets:
            ints += [int(Activation[subnet.activation.upper()]), len(subnet.hidden), *subnet.hidden]
    ints.append(int(Scale[stage.affine.upper()]) if stage.affine else 0)
    ints.append(int(Permutation[stage.permutation.upper()]) if stage.permutation else 0)
    return ints


@dataclass(frozen=True)
class FlowParams:
    """A spec and its numbers: `theta` (trained), `constants` (soft permutations; theta's dtype), `indices` (int32)."""

    spec: FlowSpec
    theta: torch.Tensor
    constants: torch.Tensor
    indices: torch.Tensor

    def named(self) -> dict[str, torch.Tensor]:
        """Every array by name, as views of the flat tensors."""
        flats = (self.theta, self.constants, self.indices)
        return {
            slot.name: slot.view(flat) for slots, flat in zip(self.spec.slots, flats, strict=True) for slot in slots
        }


def hard_permutation(index: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Check a permutation y[j] = u[index[j]] of `dim` channels; returns (index, inverse) as int32.

    Raises ValueError when index is not [dim] or does not hold each of 0..dim-1 once, TypeError when it is not integral.
    """
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        raise TypeError(f"permutation index must be integral, got {index.dtype}")
    if index.shape != (dim,):
        raise ValueError(f"permutation index must have shape [{dim}] (dim), got {list(index.shape)}")
    if not torch.equal(index.long().sort().values, torch.arange(dim, device=index.device)):
        raise ValueError(f"permutation index must hold each of 0..{dim - 1} exactly once")
    inverse = torch.empty_like(index, dtype=torch.long)
    inverse[index.long()] = torch.arange(dim, device=index.device)
    return index.to(torch.int32), inverse.to(torch.int32)


def soft_permutation(matrix: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check a soft permutation y = matrix @ u; returns what a kernel reads: (matrix^T, inverse^T, log|det|) in fp64.

    Raises ValueError when matrix is not [dim, dim], holds NaN or Inf, or is singular to the precision of its own dtype.
    """
    if not matrix.dtype.is_floating_point:
        raise TypeError(f"permutation matrix must be floating point, got {matrix.dtype}")
    if matrix.shape != (dim, dim):
        raise ValueError(f"permutation matrix must have shape [{dim}, {dim}] (dim, dim), got {list(matrix.shape)}")
    exact = matrix.detach().double()
    if not torch.isfinite(exact).all():
        raise ValueError("permutation matrix holds NaN or Inf")
    singular_values = torch.linalg.svdvals(exact)
    ratio = (singular_values[-1] / singular_values[0]).item() if singular_values[0] > 0 else 0.0
    # Rounding its entries moves no singular value by more than eps / 2 times the Frobenius norm, which is at most sqrt(dim)
    # times the largest one: above this the matrix that was rounded had an inverse too.
    floor = math.sqrt(dim) * torch.finfo(matrix.dtype).eps
    if not ratio > floor:
        raise ValueError(
            f"permutation matrix is singular: smallest / largest singular value {ratio:.2e} <= {floor:.2e}"
        )
    logdet = torch.linalg.slogdet(exact).logabsdet
    return exact.t().contiguous(), torch.linalg.inv(exact).t().contiguous(), logdet.reshape(1)
