"""What a probe returns: a number that carries the circumstances under which it was computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, eq=False, repr=False)
class Score(float):
    """A figure. It is a float (compare, format and average it as one) with these fields beside the value.

    Attributes:
        value: the figure itself.
        per_factor: the figure of each factor in the order of the factors given; NaN for those left out. None where a
            figure has no factors.
        left_out: what does not count and why: ``{"factors": {3: "constant"}, "dimensions": {0: "constant"}}``.
        choices: every free choice behind the figure, by name.
        seed: of everything random; None where nothing is.
        spread: standard deviation (unbiased) of the figure over repetitions; None where there are none.
        details: intermediate arrays and figures by name.
    """

    value: float
    per_factor: tuple[float, ...] | None = None
    left_out: Mapping[str, Mapping[Any, str]] = field(default_factory=dict)
    choices: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    spread: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __new__(cls, value: float, *args: Any, **kwargs: Any) -> Score:
        return super().__new__(cls, value)

    def __getnewargs__(self) -> tuple[float]:  # copy and pickle build the float first, then set the fields
        return (self.value,)

    def __repr__(self) -> str:
        spread = "" if self.spread is None else f" +- {self.spread:.4f}"
        return f"{type(self).__name__}({self.value:.6f}{spread})"

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values, ready for JSON; what is not finite becomes None."""
        return {item.name: plain(getattr(self, item.name)) for item in fields(self)}


@dataclass(frozen=True, eq=False)
class MutualInformation:
    """``value[d, k]`` = I(bin(z_d); y_k) in nats; stands for that array wherever NumPy wants one.

    Attributes:
        value: float64 ``[D, K]``; zero for constant dimensions and constant factors.
        factor_entropy: H(y_k), float64 ``[K]``, nats. dimension_entropy: H(bin(z_d)), float64 ``[D]``, nats.
        left_out: constant factors and dimensions, by index.
        choices: bins, rows.
    """

    value: Array
    factor_entropy: Array
    dimension_entropy: Array
    left_out: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    choices: Mapping[str, Any] = field(default_factory=dict)

    @property
    def per_factor(self) -> tuple[float, ...]:
        """The most that one dimension tells of each factor, in nats."""
        return tuple(self.value.max(axis=0).tolist())

    @property
    def shape(self) -> tuple[int, ...]:
        """``(D, K)``."""
        return self.value.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self.value, dtype=dtype) if copy else np.asarray(self.value, dtype=dtype)

    def __getitem__(self, index: Any) -> Any:
        return self.value[index]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values, ready for JSON."""
        return plain(asdict(self))


def plain(value: Any) -> Any:
    """A value as JSON knows it: arrays as lists, mappings with string keys, numbers that are not finite as None."""
    if isinstance(value, Score) and type(value) is not float:
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return value
