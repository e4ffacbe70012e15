"""Linguistic probing: what a classifier can read off a representation (tense, number, word order, depth of the tree).

Source: Conneau et al. 2018 (arXiv 1805.01070) and SentEval (arXiv 1803.05449): fit on ``tr``, choose the penalty on ``va``,
accuracy on ``te``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmvae_fast.data.lines import decoded_lines, open_file
from lmvae_fast.errors import DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.optional import require
from lmvae_fast.probes.results import Array, Score

#: Inverse penalties C of logistic regression that the validation part chooses from.
GRIDS = {"decades": (0.1, 1.0, 10.0), "senteval": tuple(2.0**power for power in range(-2, 4))}

PARTS = ("tr", "va", "te")


@dataclass(frozen=True)
class Task:
    """A probing task: ``labels[i]`` of ``sentences[i]`` in ``parts[i]`` (tr, va, te)."""

    name: str
    parts: tuple[str, ...]
    labels: tuple[str, ...]
    sentences: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sentences)


def read_task(path: str | os.PathLike[str]) -> Task:
    """Read a file of SentEval's probing format: part, label, sentence, separated by tabs.

    Raises DataError for a row of another width or an unknown part, naming the line, or a part that is absent.
    """
    path = Path(path)
    columns: tuple[list[str], list[str], list[str]] = ([], [], [])
    with open_file(path) as file:
        for number, line in decoded_lines(file, path):
            cells = line.split("\t")
            if len(cells) != 3 or cells[0] not in PARTS or not all(cells):
                raise DataError(
                    f"{path}, line {number}: not a row of a probing task", value=f"{len(cells)} fields, part {cells[0]!r}",
                    limit="part (tr, va, te), label, sentence, separated by tabs",
                )  # fmt: skip
            for column, cell in zip(columns, cells, strict=True):
                column.append(cell)
    missing = [part for part in PARTS if part not in columns[0]]
    if missing:
        raise DataError(f"{path} has no rows of a part", value=", ".join(missing), limit="tr, va and te")
    return Task(path.stem, *(tuple(column) for column in columns))


def read_tasks(folder: str | os.PathLike[str]) -> list[Task]:
    """Every task of a folder (its ``*.txt`` files in SentEval's format), sorted by name; other text files are passed over.

    Raises DataError where there is none, and for a file that begins like a task and goes on otherwise.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder of probing tasks", remedy="give the folder that holds the .txt files")
    found = []
    for path in sorted(folder.glob("*.txt")):
        with open_file(path) as file:
            if file.readline(64).decode("utf-8", "replace").split("\t")[0] in PARTS:
                found.append(read_task(path))
    if not found:
        raise DataError(f"{folder} holds no probing task", limit="files of part, label, sentence, separated by tabs")
    return found


def evaluate(
    x: Any,
    y: Any,
    part: Sequence[str],
    *,
    grid: str | Sequence[float] = "decades",
    standardise: bool = False,
    max_iter: int = 3000,
    tolerance: float = 1e-6,
) -> Score:
    """Test accuracy of multinomial logistic regression, its penalty chosen on the validation part. 0 to 1.

    Args:
        x: representations ``[N, D]``. y: labels ``[N]`` of any type. part: ``"tr"``, ``"va"`` or ``"te"`` of each row.
        grid: inverse penalties C, or a name of :data:`GRIDS`; on a tie the smaller.
        standardise: by the mean and standard deviation of the ``tr`` rows; dimensions constant there are left out (they are
            named either way: a constant gives a classifier nothing).
        max_iter, tolerance: of the solver (L-BFGS).

    Returns:
        ``choices["C"]`` is the one chosen; ``details["by_C"]`` has, for each, accuracy on ``tr``, ``va`` and ``te`` and the
        mean negative log-likelihood on ``te`` in nats; ``choices["chance"]`` the share of the most frequent label of ``te``.

    Raises:
        LatentError: x is no finite matrix. DataError: labels or parts do not fit, a part is empty, fewer than two labels to
            learn from, or a label of ``va`` or ``te`` that ``tr`` does not have.
    """
    x = checks.latents(x, name="x")
    values = GRIDS[checks.one_of("grid", grid, GRIDS)] if isinstance(grid, str) else tuple(grid)
    if not values or not all(value > 0.0 for value in values):
        raise DataError("a grid needs inverse penalties above 0", value=values)
    rows = split(part, len(x))
    y = _labels(y, rows, len(x))
    spread = np.ptp(x[rows["tr"]], axis=0)
    constant = np.flatnonzero(spread == 0.0)
    if standardise:
        alive = np.flatnonzero(spread > 0.0)
        x = (x[:, alive] - x[rows["tr"]][:, alive].mean(axis=0)) / x[rows["tr"]][:, alive].std(axis=0)
    linear = require("sklearn.linear_model", "linguistic probing")
    by_c: dict[float, dict[str, float]] = {}
    for value in sorted(values):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=require("sklearn.exceptions", "probing").ConvergenceWarning)
            model = linear.LogisticRegression(C=value, max_iter=max_iter, tol=tolerance).fit(
                x[rows["tr"]], y[rows["tr"]]
            )
        figures = {name: float(np.mean(model.predict(x[chosen]) == y[chosen])) for name, chosen in rows.items()}
        chances = model.predict_log_proba(x[rows["te"]])
        own = np.searchsorted(model.classes_, y[rows["te"]])
        figures["nll"] = float(-chances[np.arange(len(own)), own].mean())
        by_c[value] = figures
    best = max(by_c, key=lambda value: (by_c[value]["va"], -value))
    _, counts = np.unique(y[rows["te"]], return_counts=True)
    return Score(
        by_c[best]["te"],
        left_out={"dimensions": dict.fromkeys(constant.tolist(), "constant on tr")} if len(constant) else {},
        choices={"classifier": "multinomial logistic regression", "C": best, "grid": values, "standardise": standardise,
                 "rows": {name: len(chosen) for name, chosen in rows.items()}, "chance": float(counts.max() / counts.sum())},
        details={"by_C": by_c},
    )  # fmt: skip


def split(part: Sequence[str], rows: int) -> dict[str, Array]:
    """Indices of the rows of each part; raises DataError for other parts, another number of rows or an empty part."""
    names = checks.labels(part, rows, name="part")
    unknown = sorted(set(names.tolist()) - set(PARTS))
    found = {name: np.flatnonzero(names == name) for name in PARTS}
    empty = [name for name, chosen in found.items() if not len(chosen)]
    if unknown or empty:
        raise DataError(
            "parts must be tr, va and te, none empty",
            value=f"unknown: {', '.join(map(str, unknown)) or 'none'}; empty: {', '.join(empty) or 'none'}",
        )
    return found


def _labels(y: Any, rows: dict[str, Array], count: int) -> Array:
    y = checks.labels(y, count, name="y")
    learnt = np.unique(y[rows["tr"]])
    new = sorted(map(str, set(y.tolist()) - set(learnt.tolist())))
    if len(learnt) < 2 or new:
        raise DataError(
            "the rows to learn from must hold every label, two at least",
            value=f"{len(learnt)} labels in tr; elsewhere only: {', '.join(new) or 'none'}",
        )
    return y
