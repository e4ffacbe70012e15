"""Probes that need nothing but the latents (and labels): what is in them, where, and how it lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lmvae_fast.errors import LMVAEError
from lmvae_fast.evaluation import metrics as model_figures
from lmvae_fast.probes import bootstrap, clusters, projections
from lmvae_fast.probes import disentanglement as dis
from lmvae_fast.probes.checks import ABSENT
from lmvae_fast.probes.disentanglement.groups import DEAD_STD
from lmvae_fast.probes.disentanglement.information import equal_width_bins, gap, information_of_bins
from lmvae_fast.probes.factors import FactorTable
from lmvae_fast.probes.geometry import neighbour_overlap, neighbours
from lmvae_fast.probes.results import Array, Score
from lmvae_fast.probes.sections import Context, Section, Table

# Purposes of drawn rows: each has a stream of its own.
_SHUFFLE, _MAP, _NEAR = 1, 2, 3

_MOST_FACTORS = 4  # of the cluster tables
_MOST_COLOURS = 12


def overview(context: Context) -> Section:
    """How much of the latent is used: active units, KL, effective dimensions; standard deviation and KL by dimension."""
    mu, logvar = context.encodings.mu, context.encodings.logvar
    width = mu.shape[1]
    centred = context.z - context.z.mean(axis=0)
    spectrum = np.linalg.svd(centred, compute_uv=False) ** 2
    effective = spectrum.sum() ** 2 / max(float((spectrum**2).sum()), np.finfo(float).tiny)
    kl = 0.5 * (mu.double().square() + torch.expm1(logvar.double()) - logvar.double())
    std = mu.double().std(dim=0).numpy() if len(mu) > 1 else np.zeros(width)
    scores = {
        "active_units": Score(
            float(model_figures.active_units(mu)),
            choices={"of": width, "variance_of_mean": model_figures.ACTIVE_UNIT_VARIANCE},
        ),
        "kl": Score(float(kl.sum(dim=1).mean()), choices={"unit": "nats a sentence", "prior": "N(0, I)"}),
        "effective_dimensions": Score(
            float(effective), choices={"of": width, "formula": "(sum of variances)^2 / sum of squares"}
        ),
    }
    dead = {f"z[{dim}]": f"standard deviation {std[dim]:.2g}" for dim in np.flatnonzero(std < DEAD_STD)}
    pictures = {"std": std, "kl": kl.mean(dim=0).numpy()}
    return Section(scores, pictures=pictures, left_out=dead)


def disentanglement(context: Context) -> Section:
    """Which dimension tells which factor: MI matrix, MIG, modularity, explicitness, SAP, DCI, z-diff, z-min-var."""
    table, left_out = context.factors
    settings = context.settings
    order = np.random.default_rng([settings.seed, _SHUFFLE]).permutation(len(context.z))
    # Shuffled, because classifiers learn from the first rows and data may come sorted.
    z, y = context.z[order], table.y[order]
    information = dis.mutual_information(z, y, settings.bins)
    seed, rows = settings.seed, settings.tree_rows
    metrics: dict[str, Callable[[], Score]] = {
        "mig": lambda: dis.mig(z, y, settings.bins),
        "modularity": lambda: dis.modularity(information, without_information="leave_out"),
        "explicitness": lambda: dis.explicitness(z, y),
        "sap": lambda: dis.sap(z, y),
        "sap_continuous": lambda: dis.sap(z, y, kind="continuous"),
        "dci": lambda: dis.dci(
            z, y, "gbt", seed=seed, max_rows=rows, trees=settings.trees, jobs=torch.get_num_threads()
        ),
        "z_diff": lambda: dis.z_diff(z, y, seed=seed),
        "z_min_var": lambda: dis.z_min_var(z, y, seed=seed),
    }
    scores: dict[str, Score] = {}
    notes = []
    with context.bar("disentanglement", len(metrics)) as advance:
        for name, metric in metrics.items():
            try:
                scores[name] = metric()
            except LMVAEError as error:
                notes.append(f"{name}: {error.problem}")
            advance(1)
    importance = None
    found = scores.pop("dci", None)
    if isinstance(found, dis.DCI):
        importance = found.details["importance"]
        scores |= {
            "dci_disentanglement": found, "dci_completeness": _part(found, found.completeness, found.per_factor),
            "dci_informativeness": _part(found, found.informativeness, tuple(found.details["accuracy_test"].tolist())),
        }  # fmt: skip
    normalised = information.value / np.where(information.factor_entropy > 0.0, information.factor_entropy, 1.0)
    pictures: dict[str, Any] = {"factors": list(table.names), "mutual_information": normalised}
    if importance is not None:
        pictures["importance"] = importance
    header = ("factor", "values", *scores)
    lines = [
        (name, len(np.unique(table.y[table.y[:, k] >= 0, k])), *(_of(score.per_factor, k) for score in scores.values()))
        for k, name in enumerate(table.names)
    ]
    dead = {f"z[{dim}]": why for dim, why in information.left_out.get("dimensions", {}).items()}
    return Section(
        scores,
        {"By factor": Table(header, lines, "Each metric's part of every factor; empty where a metric has none.")},
        pictures,
        _information_replicates(context, table),
        {**left_out, **dead},
        notes,
    )


def cluster_separation(context: Context) -> Section:
    """How far the values of each factor lie apart, in all dimensions."""
    table, _ = context.factors
    rows = context.chosen_rows(context.settings.map_rows, _MAP)
    chosen = _clearest(table)
    scores: dict[str, Score] = {}
    replicates, lines = {}, []
    with context.bar("clusters", len(chosen)) as advance:
        for name in chosen:
            column = table.y[rows, table.names.index(name)]
            there = column != ABSENT
            x, labels = context.z[rows][there], column[there]
            found = clusters.separation(x, labels, seeds=(context.settings.seed, context.settings.seed + 1))
            scores |= {
                f"{name}: {figure}": score for figure, score in found.items() if figure in ("silhouette", "knn", "ari")
            }
            lines.append((name, len(np.unique(labels)), *(found[figure].value for figure in _CLUSTER_FIGURES)))
            near = neighbours(x, min(5, len(x) - 1))
            share = (labels[near] == labels[:, None]).mean(axis=1)
            replicates[f"{name}: neighbours alike"] = context.replicates_of_mean(share)
            scores[f"{name}: neighbours alike"] = Score(float(share.mean()), choices={"k": 5})
            advance(1)
    note = f"Of {len(rows)} sentences; factors with the fewest values."
    return Section(
        scores, {"By factor": Table(("factor", "values", *_CLUSTER_FIGURES), lines, note)}, replicates=replicates
    )


_CLUSTER_FIGURES = ("silhouette", "calinski_harabasz", "davies_bouldin", "knn", "ari", "nmi")


def maps(context: Context) -> Section:
    """The latent space in two dimensions, by PCA, t-SNE and UMAP, with what the colours may be."""
    rows = context.chosen_rows(context.settings.map_rows, _MAP)
    pictures: dict[str, Any] = {"colours": {}}
    try:
        table, _ = context.factors
    except LMVAEError:
        table = None
    if table is not None:
        for name in _clearest(table)[:2]:
            place = table.names.index(name)
            names = [str(value) for value in table.values[place]]
            pictures["colours"][name] = [names[code] if code >= 0 else "none" for code in table.y[rows, place]]
    scores, notes, drawn = {}, [], {}
    with context.bar("maps", len(context.settings.maps)) as advance:
        for method in context.settings.maps:
            try:
                found = projections.project(context.z[rows], method, seed=context.settings.seed)
                drawn[method] = found.points
                scores[f"{method}_trustworthiness"] = Score(
                    found.trustworthiness,
                    choices={**found.choices, "points": len(rows)},
                    seed=found.seed,
                    details=found.details,
                )
            except LMVAEError as error:
                notes.append(f"{method}: {error.problem}; {error.remedy or ''}".rstrip("; "))
            advance(1)
    return Section(scores, pictures={**pictures, "points": drawn}, notes=notes)


def neighbourhoods(context: Context) -> Section:
    """Which of a sentence's nearest sentences, by the encoder's own vectors, are still nearest in the latent."""
    rows = context.chosen_rows(2 * context.settings.map_rows, _NEAR)
    k = min(10, len(rows) - 1)
    ours, ceiling = context.z[rows], context.encodings.ceiling()[rows]
    kept = neighbour_overlap(ours, ceiling, k)
    near = neighbours(ours, min(3, len(rows) - 1))
    texts = [context.encodings.texts[row] for row in rows]
    lines = [(texts[row], *(texts[other] for other in near[row])) for row in range(min(5, len(rows)))]
    table = Table(("sentence", *(f"nearest {place + 1}" for place in range(near.shape[1]))), lines)
    return Section({"kept_neighbours": kept}, {"Nearest in the latent": table},
                   replicates={"kept_neighbours": context.replicates_of_mean(kept.details["per_row"])})  # fmt: skip


def _information_replicates(context: Context, table: FactorTable) -> dict[str, Array]:
    number = context.settings.resamples
    if not number:
        return {}
    binned = equal_width_bins(context.z, context.settings.bins)
    found: dict[str, list[float]] = {"mig": [], "modularity": []}
    with context.bar("resamples", number) as advance:
        for chosen in bootstrap.resamples(len(binned), number, context.settings.seed):
            value, entropy = information_of_bins(binned[chosen], table.y[chosen], context.settings.bins)
            found["mig"].append(float(np.nanmean(gap(value, entropy))) if value.shape[0] > 1 else float("nan"))
            many = value.shape[1] > 1 and value.any()
            whole = dis.modularity(value, without_information="leave_out").value if many else float("nan")
            found["modularity"].append(whole)
            advance(1)
    return {name: np.array(values) for name, values in found.items()}


def _clearest(table: FactorTable) -> list[str]:
    """The factors with the fewest values (two of them need not be much of a picture), at most a few."""
    sizes = [len(np.unique(column[column >= 0])) for column in table.y.T]
    order = sorted(range(len(sizes)), key=lambda place: (sizes[place] > _MOST_COLOURS, -min(sizes[place], 8), place))
    return [table.names[place] for place in order[:_MOST_FACTORS]]


def _part(score: dis.DCI, value: float, per_factor: tuple[float, ...] | None) -> Score:
    return Score(value, per_factor=per_factor, left_out=score.left_out, choices=score.choices, seed=score.seed)


def _of(values: tuple[float, ...] | None, place: int) -> Any:
    return "" if values is None or np.isnan(values[place]) else values[place]
