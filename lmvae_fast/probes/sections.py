"""What the probes of a model share: their settings, what they are given, and the form of what they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lmvae_fast.data.dataset import SentenceDataset
from lmvae_fast.errors import DataError
from lmvae_fast.probes import bootstrap, checks, projections
from lmvae_fast.probes import factors as factor_tables
from lmvae_fast.probes.encodings import Encodings
from lmvae_fast.probes.factors import FactorTable
from lmvae_fast.probes.results import Array, Score, plain


@dataclass(frozen=True)
class Settings:
    """Free choices of the probes of a model.

    Attributes:
        seed: of everything random.
        batch_size: sentences per pass of encoder and decoder.
        resamples: of the bootstrap; 0 for none.
        bins: of the mutual information.
        max_values: factors with more values are left out of disentanglement.
        min_rows: values of fewer sentences count as absent.
        tree_rows: DCI's boosted trees learn from at most this many sentences. trees: rounds of boosting.
        map_rows: points of a picture, and of the silhouette. maps: methods of the pictures; UMAP is slow to start.
        decoded: sentences decoded for reconstruction, and as many drawn from the prior.
        paths: interpolations. points: of each, ends included.
        vectors: word vectors of the interpolations: ``"encoder"`` (its table of token embeddings), ``"decoder"``, ``"glove"``
            or a file of vectors.
        traversed: dimensions of the traversal. steps: values of each.
    """

    seed: int = 0
    batch_size: int = 64
    resamples: int = 200
    bins: int = 20
    max_values: int = 20
    min_rows: int = 10
    tree_rows: int = 2000
    trees: int = 100
    map_rows: int = 2000
    maps: tuple[str, ...] = ("pca", "tsne")
    decoded: int = 500
    paths: int = 20
    points: int = 11
    vectors: str = "encoder"
    traversed: int = 5
    steps: int = 5

    def __post_init__(self) -> None:
        least = {"seed": 0, "resamples": 0, "bins": 2, "max_values": 2, "min_rows": 2, "tree_rows": 10, "map_rows": 10,
                 "decoded": 2, "points": 2}  # fmt: skip
        for name, value in vars(self).items():
            if name not in ("maps", "vectors"):
                checks.whole(name, value, least.get(name, 1))
        for method in self.maps:
            checks.one_of("map", method, projections.METHODS)


@dataclass(frozen=True)
class Table:
    """Rows under a header, for the page."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """What one probe found.

    Attributes:
        scores: figures by name.
        tables: by title. pictures: arrays and names that a picture is drawn from.
        replicates: of a figure over the resamples, for paired comparisons.
        left_out: what does not count, by name, and why.
        notes: sentences that a reader must know.
    """

    scores: Mapping[str, Score] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    pictures: Mapping[str, Any] = field(default_factory=dict)
    replicates: Mapping[str, Array] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __getitem__(self, name: str) -> Score:
        return self.scores[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "scores": {name: score.to_dict() for name, score in self.scores.items()},
            "tables": {
                name: plain({"header": t.header, "rows": t.rows, "note": t.note}) for name, t in self.tables.items()
            },
            "pictures": plain(dict(self.pictures)),
            "replicates": plain(dict(self.replicates)),
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Context:
    """What every probe of a run is given.

    Attributes:
        model, data, encodings: the model, the sentences, and what it makes of them.
        z: the latents probed, float64 ``[N, latent_dim]``.
        given_factors: the caller's factors, or None for the data's own.
        settings: the free choices.
        sts, linguistic: further files, or None. cache: folder of encodings, or None.
        bar: makes a progress bar: ``with bar(title, total) as advance``.
    """

    model: Any
    data: SentenceDataset
    encodings: Encodings
    z: Array
    given_factors: FactorTable | None
    settings: Settings
    sts: str | Path | None
    linguistic: str | Path | None
    cache: str | Path | None
    bar: Callable[[str, int], Any]

    @cached_property
    def factors(self) -> tuple[FactorTable, dict[str, str]]:
        """The factors that probes use, rare values absent, and those left out with the reason.

        Raises DataError where the sentences have neither factors nor labels, or none of them can be used.
        """
        table = self.given_factors if self.given_factors is not None else own_factors(self.data)
        kept, left_out = [], {}
        y = table.y.copy()
        for place, name in enumerate(table.names):
            counts = np.bincount(y[y[:, place] >= 0, place], minlength=len(table.values[place]))
            rare = np.flatnonzero((counts > 0) & (counts < self.settings.min_rows))
            y[np.isin(y[:, place], rare), place] = checks.ABSENT
            values = int((counts >= self.settings.min_rows).sum())
            lost = counts[rare].sum() / max(counts.sum(), 1)
            if values < 2:
                left_out[name] = f"{values} value with {self.settings.min_rows} sentences or more"
            elif values > self.settings.max_values:
                left_out[name] = f"{values} values, more than {self.settings.max_values}"
            elif lost > 0.5:
                left_out[name] = f"{lost:.0%} of the sentences have a value of fewer than {self.settings.min_rows}"
            else:
                kept.append(name)
        if not kept:
            raise DataError(
                "no factor can be used", value="; ".join(f"{name}: {why}" for name, why in left_out.items())[:300],
                remedy="more sentences, another table of factors, or other max_values and min_rows",
            )  # fmt: skip
        return FactorTable(table.names, table.values, y, table.choices).select(kept), left_out

    def replicates_of_mean(self, items: Any) -> Array:
        """The mean of per-row figures over the resamples of this run; empty where there are none."""
        if not self.settings.resamples:
            return np.empty(0)
        return bootstrap.replicates_of_mean(items, number=self.settings.resamples, seed=self.settings.seed)

    def chosen_rows(self, number: int, purpose: int) -> Array:
        """At most ``number`` row indices, drawn without replacement with the seed; sorted. ``purpose`` parts the streams."""
        source = np.random.default_rng([self.settings.seed, purpose])
        rows = len(self.encodings)
        return np.sort(source.permutation(rows)[:number])


def own_factors(data: SentenceDataset) -> FactorTable:
    """The generative factors of a dataset, or else the presence of its roles and the number of core roles.

    Raises DataError where it has neither.
    """
    if data.factors is not None:
        return factor_tables.generative(data)
    if data.labels is None:
        raise DataError(
            "these sentences have neither generative factors nor role labels", value=repr(data),
            remedy="give factors=lmvae_fast.probes.factors.table(...), or read a labelled file",
        )  # fmt: skip
    present = factor_tables.from_labels(data.labels)
    if not any(label.startswith("ARG") and label[3:].isdigit() for label in present.names):
        return present
    return present.beside(factor_tables.from_labels(data.labels, definition="count"))
