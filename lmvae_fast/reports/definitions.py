"""The HTML report of definition modelling: figures, their spread over words, and examples."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from lmvae_fast.probes.definition_evaluation import DefinitionReport
from lmvae_fast.reports.page import Report, style

_NAMES = {
    "sense_bleu_standard": "sense-BLEU (gloss as reference)",
    "sense_bleu_codwoe": "sense-BLEU (CODWOE's direction)",
    "lemma_bleu_standard": "lemma-BLEU (gloss as reference)",
    "lemma_bleu_codwoe": "lemma-BLEU (CODWOE's direction)",
    "encoder_cosine": "cosine of the encoder's vectors",
    "mover_score": "MoverScore",
    "nll": "NLL of the pairs under the flow, nats",
    "nll_per_dim": "the same per dimension",
    "mse": "squared distance of T(w) to the base's mean",
    "reverse_mse": "reverse dictionary: squared error",
    "reverse_cosine": "reverse dictionary: cosine",
    "reverse_rank": "reverse dictionary: rank",
}


def write_definition_report(report: DefinitionReport, path: str | os.PathLike[str], *, title: str) -> Path:
    """Write tables, histograms of what is known pair by pair, and examples. Raises MissingPackageError without matplotlib."""
    style()
    import matplotlib.pyplot as plt

    skipped = f"; {report.skipped} pairs left out, whose words have no vector" if report.skipped else ""
    page = Report(title, f"{report.pairs} definitions of {report.words} words{skipped}.")
    page.heading("Figures", "BLEU is of single sentences (nltk, smoothing method 4); compare one direction only.")
    page.table(("figure", "value"), [(_NAMES.get(name, name), float(score)) for name, score in report.figures.items()])
    known = {
        name: np.asarray(score.details[key], dtype=np.float64)
        for name, score in report.figures.items()
        for key in ("items", "pairs")
        if key in score.details
    }
    if known:
        page.heading("Over the pairs")
        figure, axes = plt.subplots(1, min(len(known), 3), figsize=(9, 2.8), squeeze=False)
        for axis, (name, values) in zip(axes[0], known.items(), strict=False):
            axis.hist(values[np.isfinite(values)], bins=30)
            axis.set_title(_NAMES.get(name, name), fontsize=8)
            axis.set_ylabel("pairs")
        page.figure(figure, "Histograms of the figures over pairs")
    page.heading("Words", "What was generated for each, and what the dictionary says.")
    page.table(
        ("word", "generated", "dictionary"),
        [(entry["word"], entry["generated"], "; ".join(entry["glosses"])) for entry in report.examples(40)],
    )
    return page.write(path)
