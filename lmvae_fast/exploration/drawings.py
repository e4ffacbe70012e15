"""Drawings of the latent operations: one figure and one table each, as a page or as a picture."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lmvae_fast.errors import ConfigError
from lmvae_fast.exploration.operations import Arithmetic, Average, Interpolation, Neighbourhood, Traversal
from lmvae_fast.files import GENERATOR, check_file_ours, replacing
from lmvae_fast.reports.page import Report, plane, style

FORMATS = (".html", ".png")
_CELLS = 80  # a picture of more cells than this has no texts in them


@dataclass(frozen=True)
class Drawing:
    """A figure (matplotlib), and the table that belongs to it."""

    title: str
    lead: str
    figure: Any
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def save(self, path: Path) -> Path:
        """Write it as ``.html`` (figure and table) or ``.png`` (figure)."""
        if path.suffix == ".html":
            report = Report(self.title, self.lead)
            report.figure(self.figure, self.title)
            report.table(self.header, self.rows)
            return report.write(path)
        with replacing(path) as temporary:
            self.figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight", metadata={"Software": GENERATOR})
        return path


def check_output(path: Path | None) -> None:
    """Before any work: raises ConfigError for a file that nothing can be drawn to, OutputError for one that is there and was
    not drawn here, MissingPackageError without matplotlib."""
    if path is None:
        return
    if path.suffix not in FORMATS:
        raise ConfigError("nothing is drawn to such a file", value=path, limit=", ".join(FORMATS))
    check_file_ours(path)
    style()


def overlap(a: str, b: str) -> float:
    """Words that two texts share, as a share of all their words (Dice's coefficient of their word counts), 0 to 1."""
    ours, theirs = Counter(a.split()), Counter(b.split())
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 1.0


def interpolation(out: Interpolation) -> Drawing:
    """Share of words that each text has in common with both ends, and the texts."""
    import matplotlib.pyplot as plt

    ends = (out.texts[0], out.texts[-1])
    shared = [[overlap(text, end) for text in out.texts] for end in ends]
    places = list(range(len(out.texts)))
    figure, axis = plt.subplots(figsize=(5, 0.8 + 0.34 * len(places)))
    for values, name, marker in zip(shared, ("the first", "the last"), ("o", "s"), strict=True):
        axis.plot(values, places, marker=marker, label=f"words shared with {name}")
    for place, text in zip(places, out.texts, strict=True):
        axis.text(1.08, place, textwrap.shorten(text, 90), va="center", parse_math=False)
    axis.set(yticks=places, yticklabels=[f"{weight:.2f}" for weight in out.weights], xlim=(-0.04, 1.04), ylabel="way")
    axis.invert_yaxis()
    axis.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    rows = [
        (f"{weight:.2f}", text, f"{first:.0%}", f"{last:.0%}")
        for weight, text, first, last in zip(out.weights, out.texts, *shared, strict=True)
    ]
    lead = f"{len(places)} points on the way between two latents, decoded."
    return Drawing("Interpolation", lead, figure, ("way", "text", "words of the first", "words of the last"), rows)


def traversal(out: Traversal) -> Drawing:
    """A grid of texts, shaded by how much each differs from the text that was started from."""
    import matplotlib.pyplot as plt

    changed = [[1.0 - overlap(text, out.start) for text in texts] for texts in out.texts]
    steps = len(out.values[0])
    figure, axis = plt.subplots(figsize=(1.2 + 1.5 * steps, 0.8 + 0.62 * len(out.dims)))
    axis.imshow(changed, aspect="auto", cmap="Oranges", vmin=0.0, vmax=1.6)
    if steps * len(out.dims) <= _CELLS:
        for row, texts in enumerate(out.texts):
            for column, text in enumerate(texts):
                words = textwrap.fill(textwrap.shorten(text, 60), 20)
                axis.text(column, row, words, ha="center", va="center", fontsize=6, parse_math=False)
    axis.grid(visible=False)
    names = _column_names(out)
    axis.set(
        xticks=range(steps), xticklabels=names, yticks=range(len(out.dims)), yticklabels=[f"z[{d}]" for d in out.dims]
    )
    own = out.probabilities is not None
    cells = [
        [f"{text} ({value:+.2f})" if own else text for value, text in zip(values, texts, strict=True)]
        for values, texts in zip(out.values, out.texts, strict=True)
    ]
    rows = [(f"z[{dim}]", *row) for dim, row in zip(out.dims, cells, strict=True)]
    moved = "quantiles of the aggregate posterior" if own else "values in standard deviations of the prior"
    lead = f"“{out.start}” while one dimension of its latent moves: {moved}. Darker: fewer words kept."
    return Drawing("Traversal", lead, figure, ("dimension", *names), rows)


def _column_names(out: Traversal) -> list[str]:
    if out.probabilities is None:
        return [f"{value:+.1f}" for value in out.values[0]]
    return [f"{probability:.1%}" for probability in out.probabilities]


def neighbourhood(out: Neighbourhood) -> Drawing:
    """The draws around the center, on their two main directions."""
    rows = [("center", 0.0, out.text)]
    rows += [(str(n), d, text) for n, (d, text) in enumerate(zip(out.distances, out.texts, strict=True), 1)]
    names = ["center", *(str(n + 1) for n in range(len(out.texts)))]
    figure = _scatter([out.center, *out.latents], names)
    lead = f"{len(out.texts)} latents drawn around “{out.text}”, nearest first."
    return Drawing("Neighbourhood", lead, figure, ("latent", "distance", "text"), rows)


def average(out: Average) -> Drawing:
    """The latents and their mean, on their two main directions."""
    rows = [("mean", 0.0, out.text)]
    rows += [(str(n), d, text) for n, (d, text) in enumerate(zip(out.distances, out.texts, strict=True), 1)]
    figure = _scatter([out.latent, *out.latents], ["mean", *(str(n + 1) for n in range(len(out.texts)))])
    return Drawing("Average", f"The mean of {len(out.texts)} latents.", figure, ("latent", "distance", "decoded"), rows)


def arithmetic(out: Arithmetic) -> Drawing:
    """The terms and their sum, on their two main directions."""
    names = [f"{factor:+g}" for factor, _ in out.terms]
    rows = [*zip(names, (text for _, text in out.terms), strict=True), ("=", out.text)]
    marks = [f"{name}  {text}" for name, (_, text) in zip(names, out.terms, strict=True)]
    figure = _scatter([out.latent, *out.latents], ["=", *marks])
    return Drawing("Arithmetic", out.text, figure, ("term", "sentence"), rows)


def _scatter(latents: Sequence[Tensor], names: Sequence[str]) -> Any:
    """Points on their two main directions; the first is the one that the others belong to."""
    import matplotlib.pyplot as plt

    points = plane([latent.tolist() for latent in latents])
    figure, axis = plt.subplots(figsize=(7, 4.6))
    axis.scatter(points[1:, 0], points[1:, 1], s=26, alpha=0.8)
    axis.scatter(points[:1, 0], points[:1, 1], s=110, marker="*")
    for point, name in zip(points, names, strict=True):
        axis.annotate(
            textwrap.shorten(name, 50), point, (5, 4), textcoords="offset points", fontsize=8, parse_math=False
        )
    axis.set(xlabel="first main direction", ylabel="second")
    return figure
