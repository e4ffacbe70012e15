"""What every probe asks of its arrays before it computes anything: finite latents, whole-numbered factors, enough rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmvae_fast.errors import ConfigError, DataError, LatentError
from lmvae_fast.probes.results import Array

#: A factor's value in rows that have no such factor: they do not count for it.
ABSENT = -1


@dataclass(frozen=True)
class Pairs:
    """Checked latents and factors.

    Attributes:
        z: float64 ``[N, D]``, finite.
        y: int64 ``[N, K]``, values coded 0 to V_k - 1 in the order of the values given; ABSENT where negative.
        given: int64 ``[N, K]``, the values as they came.
        num_values: int64 ``[K]``, V_k.
        factors: indices of the factors that count (two values or more).
        left_out: the factors and dimensions that are constant, by index.
    """

    z: Array
    y: Array
    given: Array
    num_values: Array
    factors: Array
    left_out: dict[str, dict[int, str]]

    @property
    def dimensions(self) -> Array:
        """Indices of the dimensions that are not constant."""
        dead = self.left_out.get("dimensions", {})
        return np.array([d for d in range(self.z.shape[1]) if d not in dead], dtype=np.int64)

    def rows(self, factor: int) -> Array:
        """Indices of the rows in which this factor has a value."""
        return np.flatnonzero(self.y[:, factor] >= 0)


def latents(z: Any, *, name: str = "z", min_rows: int = 1, min_dims: int = 1) -> Array:
    """``z`` as float64 ``[N, D]``; raises LatentError for another shape, too few rows, or values that are not finite."""
    z = _array(z, name)
    if z.ndim != 2 or z.dtype.kind not in "fiu":
        raise LatentError(f"{name} must be a matrix of numbers", value=f"{z.dtype} {list(z.shape)}", limit="[N, D]")
    if z.shape[0] < min_rows or z.shape[1] < min_dims:
        raise LatentError(
            f"{name} has too few rows or dimensions",
            value=list(z.shape),
            limit=f"[N >= {min_rows}, D >= {min_dims}]",
            remedy="give more sentences, or a wider latent",
        )
    z = z.astype(np.float64)
    bad = ~np.isfinite(z)
    if bad.any():
        row, dim = (int(place) for place in np.argwhere(bad)[0])
        raise LatentError(
            f"{name} is not finite",
            value=f"{z[row, dim]} at row {row}, dimension {dim} ({int(bad.sum())} such values)",
            remedy="look for the sentence of that row; a diverged model gives NaN for all",
        )
    return z


def labels(y: Any, rows: int, *, name: str = "labels") -> Array:
    """One label for each row, of any type that can be compared; raises DataError where their number is another."""
    y = _array(y, name)
    if y.ndim != 1 or len(y) != rows:
        raise DataError(f"{name} must hold one value for each row", value=list(y.shape), limit=f"[{rows}]")
    return y


def pairs(z: Any, y: Any, *, min_rows: int = 2, min_dims: int = 1, min_factors: int = 1) -> Pairs:
    """Check latents and factors together, and find what is constant.

    Args:
        z: ``[N, D]`` numbers.
        y: ``[N, K]`` (or ``[N]``) whole numbers; negative means that the row has no value of that factor.
        min_rows, min_dims, min_factors: what the metric needs, factors counted without constant ones.

    Raises:
        LatentError: latents of another shape, not finite, too few rows or dimensions that vary.
        DataError: factors of another shape or type, or too few that vary.
    """
    z = latents(z, min_rows=min_rows, min_dims=min_dims)
    y = _factors(y, len(z))
    coded = np.full(y.shape, ABSENT, dtype=np.int64)
    num_values = np.zeros(y.shape[1], dtype=np.int64)
    constant: dict[int, str] = {}
    for factor in range(y.shape[1]):
        present = y[:, factor] >= 0
        values, coded[present, factor] = np.unique(y[present, factor], return_inverse=True)
        num_values[factor] = len(values)
        if len(values) < 2:
            constant[factor] = f"one value ({values[0]})" if len(values) else "no value in any row"
    factors = np.array([factor for factor in range(y.shape[1]) if factor not in constant], dtype=np.int64)
    if len(factors) < min_factors:
        raise DataError(
            "too few factors vary over the rows",
            value=f"{len(factors)} of {y.shape[1]}",
            limit=f">= {min_factors} with two values or more",
            remedy="choose other factors, or more sentences",
        )
    dead = {int(dim): "constant" for dim in np.flatnonzero(np.ptp(z, axis=0) == 0.0)}
    if z.shape[1] - len(dead) < min_dims:
        raise LatentError(
            "too few dimensions vary over the rows",
            value=f"{z.shape[1] - len(dead)} of {z.shape[1]}",
            limit=f">= {min_dims}",
            remedy="the posterior has collapsed: train with a lower beta or with a KL target",
        )
    left_out = {name: found for name, found in (("factors", constant), ("dimensions", dead)) if found}
    return Pairs(z, coded, y, num_values, factors, left_out)


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An option that must be a whole number of [low, high]; raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low or (high or value) < value:
        limit = f"a whole number >= {low}" if high is None else f"a whole number from {low} to {high}"
        raise ConfigError(f"{name} is out of range", value=repr(value), limit=limit)
    return int(value)


def one_of(name: str, value: Any, allowed: tuple[Any, ...] | Mapping[Any, Any]) -> Any:
    """An option that must be one of a few; raises ConfigError."""
    if value not in tuple(allowed):
        raise ConfigError(f"unknown {name}", value=repr(value), limit=", ".join(map(repr, allowed)))
    return value


def share(name: str, value: Any) -> float:
    """An option that must lie strictly between 0 and 1; raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < 1.0:
        raise ConfigError(f"{name} is out of range", value=repr(value), limit="0 < share < 1")
    return float(value)


def _factors(y: Any, rows: int) -> Array:
    y = _array(y, "y")
    y = y[:, None] if y.ndim == 1 else y
    if y.ndim != 2 or len(y) != rows or y.shape[1] < 1:
        raise DataError(
            "factors y must be one row of values for each latent", value=list(y.shape), limit=f"[{rows}, K >= 1]"
        )
    if y.dtype.kind == "f" and np.all(y == np.round(y)):
        y = y.astype(np.int64)
    if y.dtype.kind not in "iub":
        raise DataError(
            "factors y must be whole numbers",
            value=str(y.dtype),
            remedy="code the values: lmvae_fast.probes.factors.table",
        )
    return y.astype(np.int64)


def _array(value: Any, name: str) -> Array:
    """A tensor (of any device) or anything array-like as an array; raises DataError for ragged nests."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    try:
        return np.asarray(value)
    except ValueError as error:
        raise DataError(f"{name} is no array", value=str(error), limit="rows of equal length") from None
