"""The page of a model's probes: tables with spreads, importance heat maps, latent maps, interpolations; and of two models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmvae_fast.probes.compare import Comparison
from lmvae_fast.probes.meanings import HEADINGS, MEANINGS, meaning
from lmvae_fast.reports.page import Report, style

_LARGE = {  # probe, figure, how it is written: what stands at the top of the page
    ("overview", "active_units"): "{:.0f}",
    ("disentanglement", "mig"): "{:.3f}",
    ("disentanglement", "z_diff"): "{:.2f}",
    ("reconstruction", "bleu"): "{:.1f}",
    ("interpolation", "smoothness"): "{:.2f}",
    ("sts", "spearman_latent"): "{:.1f}",
}
_COLOURS = 8  # of a map; the rest is grey
_CELL = 0.19  # inch of a cell of a heat map


def write(found: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page of one report (``ProbeReport.to_dict()``)."""
    style()
    data, settings = found["data"], found["settings"]
    report = Report(
        f"Probes of {found['model']}",
        f"{data['sentences']:,} sentences of {data['source']}; {settings['latents']} of a latent of "
        f"{settings['latent_dim']} dimensions; seed {settings['seed']}.",
    )
    report.cards(_large(found["sections"], settings))
    for probe, section in found["sections"].items():
        report.heading(*HEADINGS[probe])
        _section(report, probe, section)
    _fine_print(report, found)
    return report.write(path)


def write_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Write the page of two models side by side."""
    style()
    first, second = comparison.models
    report = Report(
        f"{first} and {second}",
        f"The same {comparison.sentences:,} sentences, probed alike. A difference is clear where its 95 % interval over "
        f"{comparison.resamples} paired resamples of the sentences leaves out zero.",
    )
    clear = [name for name, gap in comparison.differences.items() if gap.clear]
    report.cards([
        (str(len(comparison.differences)), "figures with resamples"), (str(len(clear)), "of them clearly different"),
        (str(len(comparison.figures)), "figures in all"),
    ])  # fmt: skip
    if comparison.differences:
        report.heading("Differences", f"{second} minus {first}.")
        report.figure(_intervals(comparison), "Differences with their intervals")
    probes = dict.fromkeys(name.partition(".")[0] for name in comparison.figures)
    for probe in probes:
        report.heading(*HEADINGS[probe])
        rows = []
        for name, values in comparison.figures.items():
            if name.partition(".")[0] == probe:
                about = meaning(probe, name.partition(".")[2])
                gap = comparison.differences.get(name)
                rows.append((
                    about.title, *(("" if value is None else value) for value in values), *_interval(gap), about.range,
                ))  # fmt: skip
        report.table(("figure", first, second, "difference", "95 % interval", "", "range"), rows)
    if comparison.not_compared:
        report.heading("Not compared")
        report.table(("figure", "why"), list(comparison.not_compared.items()))
    return report.write(path)


def _large(sections: Mapping[str, Any], settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for (probe, figure), form in _LARGE.items():
        score = sections.get(probe, {}).get("scores", {}).get(figure)
        if score is not None and score["value"] is not None:
            of = f" of {settings['latent_dim']}" if figure == "active_units" else ""
            found.append((form.format(score["value"]) + of, meaning(probe, figure).title))
    return found


def _section(report: Report, probe: str, section: Mapping[str, Any]) -> None:
    shown = {
        name: score
        for name, score in section["scores"].items()
        if probe not in ("clusters", "linguistic") or "mean" in name
    }
    rows = []
    for name, score in shown.items():
        about = meaning(probe, name)
        rows.append((about.title, about.text, _number(score["value"]), _number(score["spread"]), about.range))
    if rows:
        report.figures(rows)
    pictures = section["pictures"]
    for draw in _DRAWINGS.get(probe, ()):
        drawn = draw(section if draw is _task_bars else pictures)
        if drawn is not None:
            report.figure(*drawn)
    for title, table in section["tables"].items():
        report.part(title, table["note"])
        known = MEANINGS.get(probe, {})
        report.table([known[name].title if name in known else name for name in table["header"]], table["rows"])
    for note in section["notes"]:
        report.note(note)
    if section["left_out"]:
        named = ", ".join(f"{name} ({why})" for name, why in list(section["left_out"].items())[:12])
        more = len(section["left_out"]) - 12
        report.note(f"Left out: {named}" + (f", and {more} more." if more > 0 else "."))


def _fine_print(report: Report, found: Mapping[str, Any]) -> None:
    if found["skipped"]:
        report.heading("Not run")
        report.table(("probe", "why"), list(found["skipped"].items()))
    report.heading(
        "Choices", "Every free choice behind these figures; the JSON beside this page has them figure by figure."
    )
    hidden = {"encoding"}
    report.table(
        ("setting", "value"), [(name, str(value)) for name, value in found["settings"].items() if name not in hidden]
    )
    rows = [
        (meaning(probe, name).title, ", ".join(f"{key} {value}" for key, value in score["choices"].items()))
        for probe, section in found["sections"].items()
        for name, score in section["scores"].items()
        if score["choices"] and probe not in ("clusters", "linguistic")
    ]
    report.table(("figure", "choices"), rows)
    report.table(("part", "seconds"), [(name, round(value, 1)) for name, value in found["seconds"].items()])


def _number(value: Any) -> Any:
    return "" if value is None else float(value)


def _interval(gap: Any) -> tuple[Any, Any, str]:
    if gap is None:
        return "", "", ""
    return gap.value, f"{gap.low:+.3g} to {gap.high:+.3g}", "clear" if gap.clear else "not clear"


# Drawings: each takes a section's pictures and returns a figure and its description, or None ---------------------------


def _dimensions(pictures: Mapping[str, Any]) -> tuple[Any, str] | None:
    import matplotlib.pyplot as plt

    std, kl = (np.array(pictures[name], dtype=float) for name in ("std", "kl"))
    order = np.argsort(-std)
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.8))
    for axis, values, label in ((axes[0], std, "standard deviation of the mean"), (axes[1], kl, "KL, nats")):
        axis.bar(range(len(values)), values[order], width=1.0)
        axis.set(xlabel="dimension, widest first", ylabel=label)
    figure.tight_layout()
    return figure, "Standard deviation and KL of every dimension"


def _matrix(pictures: Mapping[str, Any], name: str, title: str) -> tuple[Any, str] | None:
    import matplotlib.pyplot as plt

    if name not in pictures:
        return None
    matrix, factors = np.array(pictures[name], dtype=float).T, pictures["factors"]
    # Dimensions by the factor that they tell most of, so that a disentangled latent shows as steps.
    order = np.lexsort((-matrix.max(axis=0), matrix.argmax(axis=0)))[:96]
    order = np.sort(np.argsort(-matrix.max(axis=0))[:96]) if matrix.shape[1] > 96 else order
    order = order[np.lexsort((-matrix[:, order].max(axis=0), matrix[:, order].argmax(axis=0)))]
    shown = matrix[:, order]
    figure, axis = plt.subplots(figsize=(max(9.0, 1.8 + _CELL * shown.shape[1]), 1.2 + 0.26 * len(factors)))
    image = axis.imshow(shown, aspect="auto", cmap="Blues", vmin=0.0, vmax=max(float(shown.max()), 1e-9))
    axis.grid(visible=False)
    axis.set(yticks=range(len(factors)), yticklabels=factors, title=title)
    axis.set_xticks(range(len(order)), [str(dim) for dim in order], rotation=90, fontsize=7)
    figure.colorbar(image, ax=axis, fraction=0.03, pad=0.015)
    return figure, title


def _information(pictures: Mapping[str, Any]) -> tuple[Any, str] | None:
    return _matrix(pictures, "mutual_information", "Share of each factor's entropy that a dimension tells")


def _importance(pictures: Mapping[str, Any]) -> tuple[Any, str] | None:
    return _matrix(pictures, "importance", "Importance of each dimension for each factor (boosted trees)")


def _maps(pictures: Mapping[str, Any]) -> tuple[Any, str] | None:
    import matplotlib.pyplot as plt

    drawn, colours = pictures["points"], pictures["colours"] or {"": None}
    if not drawn:
        return None
    figure, axes = plt.subplots(
        len(colours), len(drawn), figsize=(4.6 * len(drawn) + 1.2, 4.0 * len(colours)), squeeze=False
    )
    for line, (factor, values) in zip(axes, colours.items(), strict=True):
        for axis, (method, points) in zip(line, drawn.items(), strict=True):
            _scatter(axis, np.array(points, dtype=float), values)
            axis.set(title=f"{_METHODS[method]}, by {factor}" if factor else _METHODS[method], xticks=[], yticks=[])
            axis.grid(visible=False)
        if values is not None:
            line[-1].legend(frameon=False, fontsize=8, markerscale=1.8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return figure, "Maps of the latent space"


_METHODS = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}


def _scatter(axis: Any, points: np.ndarray, values: Sequence[str] | None) -> None:
    if values is None:
        axis.scatter(*points.T, s=7, alpha=0.6, linewidths=0)
        return
    common = [value for value, _ in Counter(value for value in values if value != "none").most_common(_COLOURS)]
    for value in [None, *common]:
        chosen = np.array([item == value if value is not None else item not in common for item in values])
        if chosen.any():
            axis.scatter(*points[chosen].T, s=8, alpha=0.75, linewidths=0, label=value or "other",
                         color="#c9ced8" if value is None else None)  # fmt: skip


def _smoothness(pictures: Mapping[str, Any]) -> tuple[Any, str] | None:
    import matplotlib.pyplot as plt

    values = np.array(pictures["smoothness"], dtype=float)
    if len(values) < 4:
        return None
    figure, axis = plt.subplots(figsize=(6, 2.2))
    axis.hist(values, bins=np.linspace(0.0, 1.0, 21).tolist())
    axis.set(xlabel="smoothness of a path", ylabel="paths", xlim=(0, 1))
    return figure, "Smoothness of the paths"


def _task_bars(section: Mapping[str, Any]) -> tuple[Any, str] | None:
    import matplotlib.pyplot as plt

    table = next(iter(section["tables"].values()))
    names, latent, encoder, chance = ([row[column] for row in table["rows"]] for column in (0, 3, 4, 5))
    places = np.arange(len(names))
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.42 * len(names)))
    axis.barh(places - 0.19, encoder, height=0.36, color="#b9c7dc", label="encoder's own vectors")
    axis.barh(places + 0.19, latent, height=0.36, label="latent")
    axis.plot(chance, places, "|", color="#1d2433", markersize=14, label="most frequent label")
    axis.set(yticks=places, yticklabels=[name.replace("_", " ") for name in names], xlim=(0, 1), xlabel="test accuracy")
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8, loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1.0))
    return figure, "Accuracy of linguistic probing by task"


def _intervals(comparison: Comparison) -> Any:
    import matplotlib.pyplot as plt

    names = list(comparison.differences)
    gaps = [comparison.differences[name] for name in names]
    # Figures have units of their own: each is drawn in half-widths of its interval.
    scale = [max((gap.high - gap.low) / 2.0, 1e-12) for gap in gaps]
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.3 * len(names)))
    for place, (gap, unit) in enumerate(zip(gaps, scale, strict=True)):
        colour = "#2f6db3" if gap.clear else "#a9b2c1"
        axis.plot([gap.low / unit, gap.high / unit], [place, place], color=colour, linewidth=3, solid_capstyle="round")
        axis.plot(gap.value / unit, place, "o", color=colour, markersize=6)
    axis.axvline(0.0, color="#1d2433", linewidth=0.8)
    labels = [f"{meaning(*name.split('.', 1)).title}" for name in names]
    axis.set(yticks=range(len(names)), yticklabels=labels, xlabel="difference, in half-widths of its 95 % interval")
    axis.invert_yaxis()
    return figure


_DRAWINGS: dict[str, tuple[Any, ...]] = {
    "overview": (_dimensions,),
    "disentanglement": (_information, _importance),
    "maps": (_maps,),
    "interpolation": (_smoothness,),
    "linguistic": (_task_bars,),
}
