"""The plot of the studied flows: validation NLL over steps, and held-out NLL against size.

    python -m benchmarks.science.definition_curves

Reads benchmarks/results/science/definitions.json, writes definitions.svg beside it.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from typing import Any

from benchmarks.common.records import RESULTS, load
from benchmarks.science.definitions import RECORD
from lmvae_fast.reports.page import style


def draw(record: dict[str, Any]) -> None:
    """Both panels; lines are means over seeds, bands and bars reach from the least to the largest."""
    style()
    import matplotlib.pyplot as plt

    fits = [fit for fit in record["fits"] if fit["fitted_to"] == "train" and "test" in fit]
    kinds = sorted({fit["kind"] for fit in fits})
    colours = dict(zip(kinds, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    over_steps, against_size = plt.subplots(1, 2, figsize=(9.6, 3.8))[1]
    groups = defaultdict(list)
    for fit in fits:
        groups[fit["kind"], fit["blocks"], fit["hidden"], fit["permutation"]].append(fit)
    lines = {5: ":", 10: "-", 20: "--"}
    for (kind, blocks, hidden, permutation), rows in sorted(groups.items()):
        if (hidden, permutation) == (512, "hard"):
            steps, means, low, high = _means([fit["validation_nll"] for fit in rows])
            over_steps.plot(
                steps, means, lines.get(blocks, "-."), color=colours[kind], label=f"{kind}, {blocks} blocks"
            )
            over_steps.fill_between(steps, low, high, color=colours[kind], alpha=0.12, linewidth=0)
        nll = [fit["test"]["nll"] for fit in rows]
        middle = statistics.fmean(nll)
        against_size.errorbar(
            rows[0]["parameters"], middle, yerr=[[middle - min(nll)], [max(nll) - middle]], color=colours[kind], capsize=2,
            marker="o" if permutation == "hard" else "s", markersize=4, mfc=colours[kind] if hidden == 512 else "white",
            linestyle="none",
        )  # fmt: skip
    over_steps.set(title="validation NLL, nats", xlabel="steps of 256 words")
    over_steps.set_ylim(top=min(400, over_steps.get_ylim()[1]))
    over_steps.legend(fontsize=7, frameon=False)
    against_size.set(title="held-out NLL, nats", xlabel="parameters", xscale="log")
    marks = (("o", "full", "hard permutation"), ("s", "full", "soft"), ("o", "none", "hidden 128 or 1,024"))
    for marker, fill, label in marks:
        against_size.plot([], [], marker, color="#5b657a", fillstyle=fill, markersize=4, label=label)
    against_size.legend(fontsize=7, frameon=False)
    figure = over_steps.figure
    figure.tight_layout()
    figure.savefig(RESULTS / RECORD.replace(".json", ".svg"))
    plt.close(figure)


def _means(curves: list[list[list[float]]]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, and mean, least and largest figure at each, as far as every curve reaches."""
    found: dict[float, list[float]] = defaultdict(list)
    for curve in curves:
        for step, nll in curve:
            found[step].append(nll)
    steps = [step for step in sorted(found) if len(found[step]) == len(curves)]
    return (
        steps, [statistics.fmean(found[step]) for step in steps], [min(found[step]) for step in steps],
        [max(found[step]) for step in steps],
    )  # fmt: skip


def main() -> int:
    """Command line."""
    record = load(RECORD)
    if record is None:
        print(f"no {RECORD}; run benchmarks.science.definitions first", file=sys.stderr)
        return 1
    draw(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
