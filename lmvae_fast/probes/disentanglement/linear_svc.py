"""Linear support vector classifiers on single latents: all dimensions and classes solved at once, exactly.

The problem of a dimension and a class is scikit-learn's LinearSVC (L2 penalty on weight and intercept, squared hinge,
one against the rest) with one feature: two unknowns, convex, piecewise quadratic. The rows inside the margin are
intervals of the sorted latents, so prefix sums of 1, x and x^2 give objective, gradient and Hessian by binary search,
and a Newton step costs log N instead of N. Thousands of fits take as long as a few of liblinear's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmvae_fast.probes.results import Array

_STEPS = 100
_HALVINGS = 40
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class SingleLatentSVC:
    """Weights and intercepts ``[D, C]``, C = V classes, or 1 where there are two (positive means the second)."""

    weight: Array
    intercept: Array

    def predict(self, z: Array) -> Array:
        """Classes ``[N, D]`` that each dimension of ``z [N, D]`` alone predicts."""
        if self.weight.shape[1] == 1:
            return (z * self.weight[:, 0] + self.intercept[:, 0] > 0.0).astype(np.int64)
        best, found = np.full(z.shape, -np.inf), np.zeros(z.shape, dtype=np.int64)
        for label in range(self.weight.shape[1]):
            decision = z * self.weight[:, label] + self.intercept[:, label]
            better = decision > best
            found[better] = label
            best = np.maximum(best, decision)
        return found


def fit(z: Array, y: Array, num_values: int, *, C: float, balanced: bool) -> SingleLatentSVC:
    """Fit a classifier of y to each dimension of z alone.

    Args:
        z: float64 ``[N, D]``. y: int64 ``[N]`` in [0, num_values), at least two values present.
        C: penalty of a row inside the margin.
        balanced: give each class the weight N / (classes * its rows). As in liblinear, among more than two classes this
            weighs the class and not the rest that it is set against.
    """
    present = np.unique(y)
    order = np.argsort(z, axis=0, kind="stable")
    x = np.take_along_axis(z, order, axis=0)
    counts = np.bincount(y, minlength=num_values)
    class_weight = np.ones(num_values)
    if balanced:
        class_weight[present] = len(y) / (len(present) * counts[present])
    weight = np.zeros((z.shape[1], num_values))
    intercept = np.full((z.shape[1], num_values), -np.inf)
    whole = _prefix_sums(x, np.ones_like(x))
    targets = present[1:] if len(present) == 2 else present
    for label in targets:
        chosen = _prefix_sums(x, (y == label)[order].astype(np.float64))
        rest = C * (class_weight[present[0]] if len(present) == 2 else 1.0)
        weight[:, label], intercept[:, label] = _solve(x, chosen, whole - chosen, C * class_weight[label], rest)
    if num_values == 2:
        return SingleLatentSVC(weight[:, 1:], intercept[:, 1:])
    if len(present) == 2:  # two of more values occur: the other takes the opposite side
        weight[:, present[0]], intercept[:, present[0]] = -weight[:, present[1]], -intercept[:, present[1]]
    return SingleLatentSVC(weight, intercept)


def _prefix_sums(x: Array, member: Array) -> Array:
    """``[3, N + 1, D]``: sums of 1, x, x^2 over the members among the first n rows."""
    sums = np.zeros((3, len(x) + 1, x.shape[1]))
    np.cumsum(member, axis=0, out=sums[0, 1:])
    np.cumsum(member * x, axis=0, out=sums[1, 1:])
    np.cumsum(member * x * x, axis=0, out=sums[2, 1:])
    return sums


def _solve(x: Array, positive: Array, negative: Array, c_positive: float, c_negative: float) -> tuple[Array, Array]:
    """Newton's method with step halving for every dimension at once: ``(w [D], b [D])``.

    Minimises (w^2 + b^2) / 2 + c+ sum_+ max(0, 1 - wx - b)^2 + c- sum_- max(0, 1 + wx + b)^2.
    """
    dims = x.shape[1]
    point = np.zeros((2, dims))
    value, gradient, hessian = _objective(x, positive, negative, c_positive, c_negative, point)
    for _ in range(_STEPS):
        (aa, ab, bb), (ga, gb) = hessian, gradient
        determinant = aa * bb - ab * ab
        step = -np.stack([bb * ga - ab * gb, aa * gb - ab * ga]) / determinant
        slope = (gradient * step).sum(axis=0)
        if np.all(-slope <= _TOLERANCE * (1.0 + value)):
            break
        length = np.ones(dims)
        for _ in range(_HALVINGS):
            candidate = point + length * step
            trial, trial_gradient, trial_hessian = _objective(x, positive, negative, c_positive, c_negative, candidate)
            short = trial > value + 1e-4 * length * slope + 1e-13 * value
            if not short.any():
                break
            length[short] *= 0.5
        point, value, gradient, hessian = candidate, trial, trial_gradient, trial_hessian
    return point[0], point[1]


def _objective(
    x: Array, positive: Array, negative: Array, c_positive: float, c_negative: float, point: Array
) -> tuple[Array, Array, Array]:
    """Objective ``[D]``, gradient ``[2, D]``, Hessian ``[3, D]`` (ww, wb, bb)."""
    w, b = point
    value = 0.5 * (w * w + b * b)
    gradient = point.copy()
    hessian = np.stack([np.ones_like(w), np.zeros_like(w), np.ones_like(w)])
    for sums, cost, sign in ((positive, c_positive, 1.0), (negative, c_negative, -1.0)):
        # Inside the margin: sign * (w x + b) < 1.
        s0, s1, s2 = _sums_below(x, sums, sign * w, 1.0 - sign * b)
        value += cost * (s0 * (1.0 - sign * b) ** 2 - 2.0 * sign * w * (1.0 - sign * b) * s1 + w * w * s2)
        gradient += 2.0 * cost * np.stack([w * s2 + (b - sign) * s1, w * s1 + (b - sign) * s0])
        hessian += 2.0 * cost * np.stack([s2, s1, s0])
    return value, gradient, hessian


def _sums_below(x: Array, sums: Array, slope: Array, bound: Array) -> Array:
    """``[3, D]``: the sums over the rows with slope * x < bound."""
    dims = np.arange(x.shape[1])
    flat = slope == 0.0
    threshold = bound / np.where(flat, 1.0, slope)
    place = _count_below(x, threshold)
    total, below = sums[:, -1], sums[:, place, dims]
    found = np.where(slope > 0.0, below, total - below)
    return np.where(flat, np.where(bound > 0.0, total, 0.0), found)


def _count_below(x: Array, threshold: Array) -> Array:
    """How many of each column's sorted values lie below its threshold, by one bisection of all columns."""
    dims = np.arange(x.shape[1])
    low, high = np.zeros(x.shape[1], dtype=np.int64), np.full(x.shape[1], len(x), dtype=np.int64)
    while np.any(low < high):
        middle = (low + high) // 2
        open_ = low < high
        less = open_ & (x[np.minimum(middle, len(x) - 1), dims] < threshold)
        low = np.where(less, middle + 1, low)
        high = np.where(open_ & ~less, middle, high)
    return low
