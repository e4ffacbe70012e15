"""Semantic textual similarity: does the similarity of two latents follow the similarity that people see?

Source: STS-B, Cer et al. 2017 (arXiv 1708.00055); the protocol is that of sentence encoders: no training.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np

from lmvae_fast.data.lines import decoded_lines, open_file
from lmvae_fast.errors import DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.optional import require
from lmvae_fast.probes.results import Array, Score

#: Similarities of two rows; larger is more alike.
SIMILARITIES = ("cosine", "dot", "negative_euclidean", "negative_manhattan")


def similarity(a: Any, b: Any, kind: str = "cosine") -> Array:
    """Row by row: ``[N, D], [N, D] -> [N]``. The cosine with a zero vector is 0."""
    checks.one_of("kind", kind, SIMILARITIES)
    a, b = checks.latents(a, name="a"), checks.latents(b, name="b")
    if a.shape != b.shape:
        raise DataError("both sides of the pairs must have one shape", value=f"{list(a.shape)} and {list(b.shape)}")
    if kind == "negative_euclidean":
        return -np.linalg.norm(a - b, axis=1)
    if kind == "negative_manhattan":
        return -np.abs(a - b).sum(axis=1)
    dot = (a * b).sum(axis=1)
    if kind == "dot":
        return dot
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide(dot, lengths, out=np.zeros_like(dot), where=lengths > 0.0)


def spearman(a: Any, b: Any, gold: Any, kind: str = "cosine") -> Score:
    """Spearman's rank correlation, times 100, of the similarity of pairs with their gold scores; ties share their rank.

    Args:
        a, b: representations of the first and second sentences, ``[N >= 2, D]``.
        gold: ``[N]`` numbers, 0 to 5 in STS-B.
        kind: of :data:`SIMILARITIES`.

    Returns:
        -100 to 100; ``details["pearson"]``, times 100 too, and ``details["similarity"]`` of each pair.

    Raises:
        LatentError: a side is no finite matrix. DataError: gold does not fit or is constant, or all similarities are equal.
    """
    found = similarity(a, b, kind)
    gold = np.asarray(gold, dtype=np.float64)
    if gold.shape != found.shape or len(gold) < 2 or not np.isfinite(gold).all():
        raise DataError(
            "gold must hold a finite score for each pair", value=list(gold.shape), limit=f"[{len(found)} >= 2]"
        )
    for name, values in (("gold score", gold), ("similarity", found)):
        if np.ptp(values) == 0.0:
            raise DataError(f"every pair has the same {name}", value=values[0], remedy="a correlation needs two values")
    stats = require("scipy.stats", "Spearman's correlation")
    return Score(
        100.0 * float(stats.spearmanr(found, gold).statistic),
        choices={"similarity": kind, "pairs": len(gold), "scale": "times 100"},
        details={"pearson": 100.0 * float(np.corrcoef(found, gold)[0, 1]), "similarity": found},
    )


def read_pairs(path: str | os.PathLike[str]) -> tuple[list[str], list[str], Array]:
    """Sentence pairs and scores of a CSV file without a header: sentence, sentence, score.

    Raises DataError for a row of another form, naming its line.
    """
    path = Path(path)
    first, second, gold = [], [], []
    try:
        with open_file(path) as file:
            rows = csv.reader(text + "\n" for _, text in decoded_lines(file, path))
            for row in rows:
                try:
                    one, two, score = row
                    gold.append(float(score))
                except ValueError:
                    raise DataError(
                        f"{path}, line {rows.line_num}: not a pair with a score", value=f"{len(row)} fields",
                        limit="sentence, sentence, number",
                    ) from None  # fmt: skip
                first.append(one)
                second.append(two)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: malformed csv: {error}", remedy="mend the quotes") from error
    if not first:
        raise DataError(f"{path} holds no pair", remedy="check the file")
    return first, second, np.array(gold)
