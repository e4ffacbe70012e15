"""The time of probes of a wide latent: metrics against a loop over pairs, and the whole report after encoding.

    python -m benchmarks.science.probes_speed [--sts stsb_en_dev.csv] [--linguistic probing/]

The loops are written as disentanglement_lib's are: one scikit-learn call for each pair of a dimension and a factor, one pass in
Python for each group. Both sides must agree before a time is printed. The report is every probe of ``lf.probe`` on 10,000
sentences of the bundled corpus (its generative factors of at most twenty values), by a random model of GPT-2's shape, which
never ends a sentence early: decoding is at its slowest. Writes benchmarks/results/science/probes_speed.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score
from sklearn.svm import LinearSVC

import lmvae_fast as lf
from benchmarks.common import cases, records
from lmvae_fast.probes import disentanglement
from lmvae_fast.profiling.measure import machine


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


def loop_z_diff(z: np.ndarray, y: np.ndarray, group: int = 64, train: int = 1000, test: int = 500) -> float:
    """One repetition, group by group: rows of one value are looked for anew in the whole data, as the public loops do."""
    source = np.random.default_rng(0)
    features, targets = np.empty((train + test, z.shape[1])), source.integers(y.shape[1], size=train + test)
    for row, factor in enumerate(targets):
        gaps = []
        for _ in range(group):
            first = source.integers(len(z))
            second = source.choice(np.flatnonzero(y[:, factor] == y[first, factor]))
            gaps.append(np.abs(z[first] - z[second]))
        features[row] = np.mean(gaps, axis=0)
    model = LogisticRegression(max_iter=1000).fit(features[:train], targets[:train])
    return float(model.score(features[train:], targets[train:]))


def timed(run: Callable[[], Any], rounds: int) -> tuple[Any, float]:
    """The result and the least seconds of some rounds."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - started)
    return result, min(seconds)


def compare_metrics(rows: int, dims: int, factors: int, rounds: int) -> dict[str, Any]:
    """Seconds of each metric, and of its loop where there is one."""
    z, y = make_code(rows, dims, factors)
    ours, information = timed(lambda: disentanglement.mutual_information(z, y).value, rounds)
    theirs, information_loop = timed(lambda: loop_information(z, y), 1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    scores, sap = timed(lambda: disentanglement.sap(z, y).details["scores"], rounds)
    looped, sap_loop = timed(lambda: loop_sap(z, y), 1)
    np.testing.assert_allclose(scores, looped, rtol=0, atol=5e-3)
    one, z_diff = timed(lambda: disentanglement.z_diff(z, y, repetitions=1).value, rounds)
    other, z_diff_loop = timed(lambda: loop_z_diff(z, y), 1)
    np.testing.assert_allclose(one, other, rtol=0, atol=0.1)  # other draws, of 500 groups judged
    metrics: dict[str, Callable[[], Any]] = {
        "explicitness": lambda: disentanglement.explicitness(z, y),
        "z_min_var": lambda: disentanglement.z_min_var(z, y),
        "dci, gradient boosting, 2,000 rows, 1 job": lambda: disentanglement.dci(z, y, max_rows=2000),
        "dci, gradient boosting, 2,000 rows, 2 jobs": lambda: disentanglement.dci(z, y, max_rows=2000, jobs=2),
    }
    return {
        "rows": rows, "dims": dims, "factors": factors,
        "mutual_information": {"seconds": information, "loop_seconds": information_loop},
        "sap": {"seconds": sap, "loop_seconds": sap_loop},
        "z_diff, one repetition": {"seconds": z_diff, "loop_seconds": z_diff_loop},
        **{name: {"seconds": timed(run, 1)[1]} for name, run in metrics.items()},
    }  # fmt: skip


def whole_report(sentences: int, dims: int, shape: str, sts: str | None, linguistic: str | None) -> dict[str, Any]:
    """Seconds of every probe; encoding apart."""
    corpus = lf.generate_corpus(sentences)
    with tempfile.TemporaryDirectory() as folder:
        case = cases.make_case(Path(folder), shape, corpus.texts, 8, torch.get_num_threads())
        model = lf.LMVAE(
            lf.LMVAEConfig(
                encoder=str(case.parent / "encoder"), decoder=str(case.parent / "decoder"), latent_dim=dims,
                max_len=cases.MAX_LEN,
            )
        )  # fmt: skip
        report = lf.probe(model, corpus, sts=sts, linguistic=linguistic, progress=True)
    seconds = {name: round(value, 2) for name, value in report.seconds.items()}
    return {
        "sentences": sentences, "dims": dims, "model": shape, "factors": len(report["disentanglement"].pictures["factors"]),
        "seconds": seconds, "seconds_after_encoding": round(sum(seconds.values()) - seconds["encoding"], 1),
        "skipped": dict(report.skipped),
    }  # fmt: skip


def main() -> int:
    """Compare, then time, then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10000)
    parser.add_argument("--dims", type=int, default=128)
    parser.add_argument("--factors", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", default="gpt2-small", choices=list(cases.SHAPES))
    parser.add_argument("--sts", help="CSV file of sentence pairs")
    parser.add_argument("--linguistic", help="folder of tasks in SentEval's format")
    parser.add_argument("--output", type=Path, default=records.RESULTS / "science" / "probes_speed.json")
    options = parser.parse_args()
    record = {
        "command": "python -m benchmarks.science.probes_speed " + " ".join(sys.argv[1:]), "machine": machine("cpu"),
        "report": whole_report(options.rows, options.dims, options.shape, options.sts, options.linguistic),
        "metrics": compare_metrics(options.rows, options.dims, options.factors, options.rounds),
    }  # fmt: skip
    records.write(record, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
