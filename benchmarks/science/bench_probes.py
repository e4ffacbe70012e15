"""Disentanglement metrics of a wide latent: all dimensions and factors at once, against a loop over pairs.

``python -m benchmarks.science.bench_probes --rows 10000 --dims 128`` prints JSON. The loop is written as disentanglement_lib's
is: one scikit-learn call for each pair. Both sides must agree before a time is printed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.metrics import mutual_info_score
from sklearn.svm import LinearSVC

from lmvae_fast.probes import disentanglement


def make_code(rows: int, dims: int, factors: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A noisy code: each factor of 2 to 6 values shows in one dimension and a little in all."""
    source = np.random.default_rng(seed)
    y = np.stack([source.integers(2 + k % 5, size=rows) for k in range(factors)], axis=1)
    z = source.normal(size=(rows, dims))
    z[:, :factors] += 1.5 * y
    return z + 0.05 * y @ source.normal(size=(factors, dims)), y


def loop_information(z: np.ndarray, y: np.ndarray, bins: int = 20) -> np.ndarray:
    """Mutual information pair by pair."""
    found = np.zeros((z.shape[1], y.shape[1]))
    for dim in range(z.shape[1]):
        edges = np.histogram(z[:, dim], bins)[1]
        binned = np.digitize(z[:, dim], edges[:-1])
        for factor in range(y.shape[1]):
            found[dim, factor] = mutual_info_score(y[:, factor], binned)
    return found


def loop_sap(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Test accuracy of a linear SVC pair by pair."""
    cut = len(z) * 2 // 3
    found = np.zeros((z.shape[1], y.shape[1]))
    for dim in range(z.shape[1]):
        for factor in range(y.shape[1]):
            model = LinearSVC(C=0.01, class_weight="balanced").fit(z[:cut, [dim]], y[:cut, factor])
            found[dim, factor] = model.score(z[cut:, [dim]], y[cut:, factor])
    return found


def timed(run: Callable[[], Any], rounds: int) -> tuple[Any, float]:
    """The result and the least seconds of some rounds."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - started)
    return result, min(seconds)


def main() -> None:
    """Compare, then time, then print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10000)
    parser.add_argument("--dims", type=int, default=128)
    parser.add_argument("--factors", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    z, y = make_code(options.rows, options.dims, options.factors)
    ours, information = timed(lambda: disentanglement.mutual_information(z, y).value, options.rounds)
    theirs, information_loop = timed(lambda: loop_information(z, y), 1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    scores, sap = timed(lambda: disentanglement.sap(z, y).details["scores"], options.rounds)
    looped, sap_loop = timed(lambda: loop_sap(z, y), 1)
    np.testing.assert_allclose(scores, looped, rtol=0, atol=5e-3)
    metrics: dict[str, Callable[[], Any]] = {
        "explicitness": lambda: disentanglement.explicitness(z, y),
        "z_diff": lambda: disentanglement.z_diff(z, y),
        "z_min_var": lambda: disentanglement.z_min_var(z, y),
        "dci, 2,000 rows": lambda: disentanglement.dci(z, y, max_rows=2000),
    }
    record = {
        "rows": options.rows, "dims": options.dims, "factors": options.factors,
        "mutual_information": {"seconds": information, "loop_seconds": information_loop},
        "sap": {"seconds": sap, "loop_seconds": sap_loop},
        **{name: {"seconds": timed(run, 1)[1]} for name, run in metrics.items()},
    }  # fmt: skip
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
