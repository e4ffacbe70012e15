"""Probes by tasks of their own sentences: similarity of pairs, linguistic classification; beside the encoder's own vectors."""

from __future__ import annotations

from typing import Any

import numpy as np

from lmvae_fast.errors import DataError
from lmvae_fast.probes import bootstrap
from lmvae_fast.probes import linguistic as tasks
from lmvae_fast.probes import sts as similarity
from lmvae_fast.probes.encodings import Encodings, encode
from lmvae_fast.probes.optional import require
from lmvae_fast.probes.results import Array, Score
from lmvae_fast.probes.sections import Context, Section, Table


def sts(context: Context) -> Section:
    """Cosine of two posterior means against the similarity that people see; the encoder's own vectors as the ceiling."""
    if context.sts is None:
        raise DataError(
            "STS needs sentence pairs with scores", value="sts=None", remedy="give a CSV file of pairs (--sts)"
        )
    _no_labels(context)
    first, second, gold = similarity.read_pairs(context.sts)
    both = _encoded(context, first + second, "sts")
    half = len(first)
    scores, replicates = {}, {}
    for name, vectors in (("latent", both.means()), ("encoder", both.ceiling())):
        scores[f"spearman_{name}"] = similarity.spearman(vectors[:half], vectors[half:], gold)
        found = scores[f"spearman_{name}"].details["similarity"]
        replicates[f"spearman_{name}"] = _rank_replicates(context, found, gold)
    scores["share_kept"] = Score(
        scores["spearman_latent"] / scores["spearman_encoder"], choices={"of": "the encoder's"}
    )
    gap = np.abs(_ranks(scores["spearman_latent"].details["similarity"]) - _ranks(gold))
    worst = np.argsort(-gap)[:5]
    cosines = scores["spearman_latent"].details["similarity"]
    lines = [(first[row], second[row], float(gold[row]), float(cosines[row])) for row in worst]
    return Section(scores, {"Pairs farthest off": Table(("first", "second", "gold", "cosine of latents"), lines)},
                   replicates=replicates)  # fmt: skip


def linguistic(context: Context) -> Section:
    """What logistic regression reads off the posterior mean, and off the encoder's own vectors."""
    if context.linguistic is None:
        raise DataError(
            "linguistic probing needs tasks", value="linguistic=None",
            remedy="give a folder of files in SentEval's format (--linguistic)",
        )  # fmt: skip
    _no_labels(context)
    found = tasks.read_tasks(context.linguistic)
    scores: dict[str, Score] = {}
    lines = []
    with context.bar("linguistic probing", len(found)) as advance:
        for task in found:
            encodings = _encoded(context, list(task.sentences), task.name)
            ours = tasks.evaluate(encodings.means(), task.labels, task.parts, standardise=True)
            ceiling = tasks.evaluate(encodings.ceiling(), task.labels, task.parts, standardise=True)
            scores[f"{task.name}: latent"], scores[f"{task.name}: encoder"] = ours, ceiling
            lines.append((task.name, len(set(task.labels)), ours.choices["rows"]["te"], ours.value, ceiling.value,
                          ours.choices["chance"]))  # fmt: skip
            advance(1)
    scores["mean: latent"] = Score(float(np.mean([line[3] for line in lines])), choices={"tasks": len(lines)})
    scores["mean: encoder"] = Score(float(np.mean([line[4] for line in lines])), choices={"tasks": len(lines)})
    header = ("task", "labels", "test rows", "latent", "encoder", "most frequent label")
    return Section(scores, {"Accuracy by task": Table(header, lines)}, {"tasks": [line[0] for line in lines]})


def _encoded(context: Context, sentences: list[str], title: str) -> Encodings:
    with context.bar(f"encode {title}", len(sentences)) as advance:
        return encode(
            context.model, sentences, cache=context.cache, batch_size=context.settings.batch_size, progress=advance
        )


def _no_labels(context: Context) -> None:
    if context.model.config.annotations:
        raise DataError(
            "this model reads role labels, which the sentences of this task do not have",
            value=f"annotations {list(context.model.config.annotations)[:3]} ...", remedy="probe a model without annotations",
        )  # fmt: skip


def _ranks(values: Any) -> Array:
    return require("scipy.stats", "ranks").rankdata(values)


def _rank_replicates(context: Context, found: Array, gold: Array) -> Array:
    number = context.settings.resamples
    if not number:
        return np.empty(0)

    def correlation(rows: Array) -> float:
        ours, theirs = _ranks(found[rows]), _ranks(gold[rows])
        return 100.0 * float(np.corrcoef(ours, theirs)[0, 1]) if np.ptp(ours) and np.ptp(theirs) else float("nan")

    return bootstrap.replicates(correlation, len(gold), number=number, seed=context.settings.seed)
