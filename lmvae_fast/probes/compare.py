"""Two models' probe reports side by side, with a paired bootstrap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmvae_fast.errors import DataError
from lmvae_fast.probes.bootstrap import Difference, paired_difference

#: Settings that must agree: otherwise the figures answer different questions.
_ALIKE = (
    "latents", "seed", "resamples", "bins", "max_values", "min_rows", "tree_rows", "trees", "map_rows", "decoded", "paths",
    "points",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Figures of two models on the same sentences.

    Attributes:
        models: their names. sentences: how many. resamples: of the bootstrap.
        figures: ``probe.figure`` -> (first, second); None where a model has none.
        differences: of the figures with replicates.
        not_compared: figures that are not, and why.
    """

    models: tuple[str, str]
    sentences: int
    resamples: int
    figures: Mapping[str, tuple[float | None, float | None]]
    differences: Mapping[str, Difference]
    not_compared: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "models": list(self.models),
            "sentences": self.sentences,
            "resamples": self.resamples,
            "figures": {name: list(values) for name, values in self.figures.items()},
            "differences": {name: gap.to_dict() for name, gap in self.differences.items()},
            "not_compared": dict(self.not_compared),
        }


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> Comparison:
    """Compare two reports (``ProbeReport.to_dict()``, or what ``read_report`` read).

    Raises:
        DataError: they are of different sentences, or were made with different settings.
    """
    for reported, what in (("fingerprint", "sentences"), ("sentences", "numbers of sentences")):
        if first["data"][reported] != second["data"][reported]:
            raise DataError(
                f"the reports are of different {what}", value=f"{first['data']['source']} and {second['data']['source']}",
                limit="the same sentences in the same order", remedy="probe both models on the same --data",
            )  # fmt: skip
    different = [name for name in _ALIKE if first["settings"].get(name) != second["settings"].get(name)]
    if different:
        raise DataError(
            "the reports were made with different settings",
            value=", ".join(f"{n} {first['settings'].get(n)} and {second['settings'].get(n)}" for n in different),
            remedy="probe both models with the same settings",
        )
    figures: dict[str, tuple[float | None, float | None]] = {}
    differences: dict[str, Difference] = {}
    not_compared: dict[str, str] = {}
    for probe in dict.fromkeys([*first["sections"], *second["sections"]]):
        ours, theirs = (report["sections"].get(probe) for report in (first, second))
        if ours is None or theirs is None:
            not_compared[probe] = "only one of the models was probed so"
            continue
        for name in dict.fromkeys([*ours["scores"], *theirs["scores"]]):
            key, pair = f"{probe}.{name}", [section["scores"].get(name) for section in (ours, theirs)]
            values = tuple(None if score is None else score["value"] for score in pair)
            vectors = [(score or {}).get("details", {}).get("vectors") for score in pair]
            if None not in values and vectors[0] != vectors[1]:
                not_compared[key] = "different word vectors: choose one table for both (vectors=)"
                continue
            figures[key] = (values[0], values[1])
            replicates = [section["replicates"].get(name) for section in (ours, theirs)]
            if values[0] is not None and values[1] is not None and all(replicates):
                pairs = [[float("nan") if x is None else x for x in values_ or ()] for values_ in replicates]
                differences[key] = paired_difference(values[0], values[1], pairs[0], pairs[1])
    if not figures:
        raise DataError("the reports share no figure", value=", ".join(not_compared) or "no probe")
    models = str(first["model"]), str(second["model"])
    if models[0] == models[1]:
        models = f"{models[0]} (A)", f"{models[1]} (B)"
    return Comparison(
        models, int(first["data"]["sentences"]), int(first["settings"]["resamples"]), figures, differences, not_compared
    )
