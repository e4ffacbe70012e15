"""Mutual information of every dimension with every factor at once, and the two figures made of it: MIG and modularity.

N rows, D dimensions, K factors, V_k values of factor k. Sources: MIG, Chen et al. 2018 (arXiv 1802.04942), section 4;
modularity, Ridgeway & Mozer 2018 (arXiv 1802.05312), section 3; both binned as Locatello et al. 2019 (arXiv 1811.12359) do.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lmvae_fast.errors import DataError, LatentError
from lmvae_fast.memory import check_memory
from lmvae_fast.probes import checks
from lmvae_fast.probes.results import Array, MutualInformation, Score

_BLOCK = 1 << 24  # cells of one table of counts: 128 MiB


def equal_width_bins(z: Array, bins: int) -> Array:
    """The bin of every latent, between the smallest and the largest of its dimension; the last bin is closed.

    float64 ``[N, D]`` -> int64 ``[N, D]`` in [0, bins). A constant dimension falls into bin 0.
    """
    low = z.min(axis=0)
    width = (z.max(axis=0) - low) / bins
    safe = np.where(width > 0.0, width, 1.0)
    found = np.clip((z - low) / safe, 0, bins - 1).astype(np.int64)
    # The division rounds: an edge that is itself a latent must fall to the right of it, as a comparison says.
    found -= z < found * width + low
    found += (z >= (found + 1) * width + low) & (found < bins - 1)
    return np.where(width > 0.0, found, 0)


def mutual_information(z: Any, y: Any, bins: int = 20) -> MutualInformation:
    """I(bin(z_d); y_k) in nats, plug-in estimate, of all dimensions and factors.

    Args:
        z: latents ``[N >= 2, D]``.
        y: factors ``[N, K]``, whole numbers; rows where a factor is negative do not count for that factor.
        bins: bins of equal width for each dimension, between its extremes over all N rows; at least 2.

    Returns:
        ``[D, K]`` float64, also usable as an array. Constant dimensions and factors have 0 and are named in ``left_out``.

    Raises:
        LatentError: z is no finite matrix. DataError: y does not fit z. ConfigError: bins.
    """
    bins = checks.whole("bins", bins, 2)
    pairs = checks.pairs(z, y, min_factors=0)
    found = equal_width_bins(pairs.z, bins)
    value, factor_entropy = information_of_bins(found, pairs.y, bins)
    value[list(pairs.left_out.get("dimensions", {}))] = 0.0
    share = _joint_counts(found, np.zeros(len(found), dtype=np.int64), bins, 1)[:, :, 0] / len(found)
    choices = {"bins": bins, "binning": "equal width between the extremes of each dimension", "rows": len(pairs.z)}
    return MutualInformation(value, factor_entropy, _entropy(share), pairs.left_out, choices)


def information_of_bins(found: Array, y: Array, bins: int) -> tuple[Array, Array]:
    """Mutual information ``[D, K]`` and factor entropies ``[K]`` in nats, of latents that are binned already.

    Args:
        found: int64 ``[N, D]`` in [0, bins). y: int64 ``[N, K]``; negative where a row does not count.
    """
    value, entropy = np.zeros((found.shape[1], y.shape[1])), np.zeros(y.shape[1])
    for factor in range(y.shape[1]):
        rows = np.flatnonzero(y[:, factor] >= 0)
        if not len(rows):
            continue
        column = y[rows, factor]
        width = int(column.max()) + 1
        step = max(1, _BLOCK // (bins * width))
        for start in range(0, found.shape[1], step):
            counts = _joint_counts(found[rows, start : start + step], column, bins, width)
            value[start : start + step, factor] = _information(counts / len(rows))
        entropy[factor] = _entropy(np.bincount(column) / len(rows))
    return value, entropy


def gap(value: Array, entropy: Array) -> Array:
    """[I(1st dimension) - I(2nd)] / H(factor) of each factor ``[K]``; NaN where the entropy is zero."""
    first_two = -np.sort(-value, axis=0)[:2]
    return np.divide(first_two[0] - first_two[1], entropy, out=np.full(len(entropy), np.nan), where=entropy > 0.0)


def mig(z: Any, y: Any, bins: int = 20, *, normalise: str = "factor") -> Score:
    """Mutual information gap: mean over factors of [I(1st dimension) - I(2nd)] / H(factor). From 0 to 1.

    Args:
        z: latents ``[N, D]`` of which at least two dimensions vary.
        y: factors ``[N, K]``; constant ones are left out.
        bins: as in :func:`mutual_information`.
        normalise: ``"factor"``, the published definition; dividing by the code's entropy, as one public implementation
            does, is another figure.

    Raises:
        LatentError, DataError, ConfigError: as :func:`mutual_information`; also where no factor or dimension varies.
    """
    checks.one_of("normalise", normalise, ("factor",))
    checks.pairs(z, y, min_dims=2, min_factors=1)
    found = mutual_information(z, y, bins)
    varies = [factor for factor in range(found.shape[1]) if factor not in found.left_out.get("factors", {})]
    per_factor = np.full(found.shape[1], np.nan)
    per_factor[varies] = gap(found.value, found.factor_entropy)[varies]
    return Score(
        float(per_factor[varies].mean()),
        per_factor=tuple(per_factor.tolist()),
        left_out=found.left_out,
        choices={**found.choices, "normalise": "entropy of the factor"},
        details={"best_dimension": found.value.argmax(axis=0), "mutual_information": found.value},
    )


def modularity(mi: Any, *, without_information: str = "zero") -> Score:
    """Mean over dimensions of 1 - sum_{k not k*} I_dk^2 / (I_dk*^2 (K - 1)), k* the dimension's best factor. 0 to 1.

    A dimension of pure noise has a value of its own (about 2/3 for a few factors), so a perfect code with noise beside it
    stays below 1.

    Args:
        mi: ``[D, K >= 2]``, not negative: an array, or what :func:`mutual_information` returns; the constant factors that
            the latter names are left out.
        without_information: a dimension without any information counts ``"zero"``, as in disentanglement_lib, or is
            left out (``"leave_out"``); either way it is named.

    Returns:
        ``details["per_dimension"]`` has the value of each dimension; ``per_factor`` the mean over the dimensions whose
        best factor it is (NaN where there is none).
    """
    checks.one_of("without_information", without_information, ("zero", "leave_out"))
    left_out: dict[str, dict[int, str]] = {}
    if isinstance(mi, MutualInformation):
        left_out = {name: dict(found) for name, found in mi.left_out.items() if name == "factors"}
    matrix = checks.latents(mi.value if isinstance(mi, MutualInformation) else mi, name="mi")
    factors = np.array([k for k in range(matrix.shape[1]) if k not in left_out.get("factors", {})], dtype=np.int64)
    if len(factors) < 2:
        raise DataError("modularity compares factors", value=f"{len(factors)} that vary", limit=">= 2")
    if matrix.min() < 0.0:
        # Rounding makes an information of zero a little negative; more than that is no information.
        if matrix.min() < -1e-9:
            raise DataError("mutual information is never negative", value=float(matrix.min()), limit=">= 0")
        matrix = np.maximum(matrix, 0.0)
    squared = matrix[:, factors] ** 2
    best = squared.max(axis=1)
    silent = best == 0.0
    per_dimension = 1.0 - (squared.sum(axis=1) - best) / (np.where(silent, 1.0, best) * (len(factors) - 1))
    per_dimension[silent] = 0.0 if without_information == "zero" else np.nan
    if silent.all() and without_information == "leave_out":
        raise LatentError(
            "no dimension tells anything of any factor", value=list(matrix.shape), remedy="check the factors"
        )
    if silent.any():
        reason = "no information: counts 0" if without_information == "zero" else "no information"
        left_out["dimensions"] = {int(dim): reason for dim in np.flatnonzero(silent)}
    favourite = np.where(silent, -1, factors[squared.argmax(axis=1)])
    per_factor = [
        float(per_dimension[favourite == factor].mean()) if np.any(favourite == factor) else float("nan")
        for factor in range(matrix.shape[1])
    ]
    return Score(
        float(np.nanmean(per_dimension)),
        per_factor=tuple(per_factor),
        left_out=left_out,
        choices={"without_information": without_information, "factors": len(factors)},
        details={"per_dimension": per_dimension, "best_factor": favourite},
    )


def _joint_counts(found: Array, y: Array, bins: int, width: int) -> Array:
    """``counts[d, b, v]``: rows whose dimension d is in bin b and whose factor has value v."""
    dims = found.shape[1]
    check_memory(f"counts in {bins:,} bins", "lower bins", 8 * dims * (bins * width + 2 * len(found)))
    cells = (np.arange(dims) * bins + found) * width + y[:, None]
    return np.bincount(cells.ravel(), minlength=dims * bins * width).reshape(dims, bins, width)


def _information(joint: Array) -> Array:
    """Mutual information of each joint distribution ``[..., B, V]``, in nats."""
    expected = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    there = joint > 0.0
    ratio = np.divide(joint, expected, out=np.ones_like(joint), where=there)
    return np.maximum((joint * np.log(ratio)).sum(axis=(-2, -1)), 0.0)


def _entropy(shares: Array) -> Array:
    """Entropy over the last axis, in nats."""
    return -(shares * np.log(np.where(shares > 0.0, shares, 1.0))).sum(axis=-1)
