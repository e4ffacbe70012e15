"""Tables of the studies of LlaMaVAE's flow (definition modelling) and of the conditional VAE's penalties."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.common.records import RESULTS, load, where


def _mean(values: Sequence[float], form: str) -> str:
    """Their mean, and the standard deviation where there are several; nothing of none (texts of less than four words have no
    distinct-4)."""
    if not values:
        return ""
    shown = form.format(statistics.fmean(values))
    return shown if len(values) < 2 else f"{shown} +- {form.format(statistics.stdev(values))}"


def _grouped(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[tuple, list[dict[str, Any]]]:
    """Rows that are alike but for their seed."""
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return found


def _source(record: dict[str, Any]) -> str:
    return f"`{record['command']}` ({where(record['machine'])})"


#: Of the glosses: figure, title, form.
_SAID = (
    ("gloss_nats", "nats of the gold gloss", "{:.1f}"), ("encoder_cosine", "cosine", "{:.3f}"),
    ("sense_bleu_standard", "sense-BLEU", "{:.4f}"), ("sense_bleu_codwoe", "sense-BLEU (CODWOE)", "{:.4f}"),
    ("lemma_bleu_codwoe", "lemma-BLEU (CODWOE)", "{:.4f}"),
)  # fmt: skip


def definition_ways() -> str:
    """Ways from a word to its gloss: Flow(tr), Flow(all), the conditional baseline, a draw from the prior."""
    record = load("science/definitions.json")
    if record is None:
        return "Not measured."
    first = record["fits"][0]
    names = ("kind", "blocks", "hidden", "permutation")
    same = [fit for fit in record["fits"] if all(fit[name] == first[name] for name in names) and "test" in fit]
    ways = {
        "Flow(tr)": [fit["test"] for fit in same if fit["fitted_to"] == "train"],
        "Flow(all)": [fit["test"] for fit in same if fit["fitted_to"] == "all"],
        "word vector into the posterior head, no flow": [record.get("conditional", {}).get("test")],
        "latent drawn from the prior": [record["prior"]],
    }
    titles = [title for _, title, _ in _SAID]
    lines = [f"| from a word to its gloss | {' | '.join(titles)} | seeds |", "|---" * (len(titles) + 2) + "|"]
    for name, found in ways.items():
        if found and found[0] is not None:
            cells = [_mean([row[figure] for row in found], form) for figure, _, form in _SAID]
            lines.append(f"| {name} | {' | '.join(cells)} | {len(found)} |")
    notes = [f"- flows and draws: {_source(record)}"]
    if "conditional" in record:
        notes.append(f"- without a flow: {_source(record['conditional'])}")
    vae = load("science/definitions/vae.json")
    if vae is not None and "final" in vae:
        final = vae["final"]
        notes.append(
            f"- the VAE: {final['steps']} steps, reconstruction of held-out glosses {final['reconstruction']:.1f} nats "
            f"({final['reconstruction_per_token']:.2f} a token), BLEU-4 {final['bleu']:.3f}, KL {final['kl']:.0f}, "
            f"{final['active_units']} of {final['latent_dim']} units active: {_source(vae)}"
        )
    return "\n".join([*lines, "", *notes])


def definition_flows() -> str:
    """Architectures of the flow, fitted to the training part."""
    record = load("science/definitions.json")
    if record is None:
        return "Not measured."
    lines = [
        "| kind | blocks | hidden | permutation | parameters | held-out NLL, nats | cosine of its glosses | sense-BLEU | steps "
        "| ms a step | seeds |",
        "|---" * 11 + "|",
    ]
    names = ("kind", "blocks", "hidden", "permutation")
    rows = _grouped([fit for fit in record["fits"] if fit["fitted_to"] == "train"], names)

    def quality(item: tuple[tuple, list[dict[str, Any]]]) -> float:
        done = [fit["test"]["nll"] for fit in item[1] if "test" in fit]
        return statistics.fmean(done) if done else float("inf")

    for key, fits in sorted(rows.items(), key=quality):
        done = [fit for fit in fits if "test" in fit]
        kind, blocks, hidden, permutation = key
        start = f"| {kind} | {blocks} | {hidden} | {permutation} | {fits[0]['parameters']:,} |"
        if not done:
            at = ", ".join(str(fit["diverged_at"]) for fit in fits)
            lines.append(f"{start} diverged at step {at} | | | | | {len(fits)} |")
            continue
        figures = (("nll", "{:.1f}"), ("encoder_cosine", "{:.3f}"), ("sense_bleu_standard", "{:.4f}"))
        cells = [_mean([fit["test"][name] for fit in done], form) for name, form in figures]
        steps = f"{statistics.fmean(fit['steps'] for fit in done):,.0f}"
        each = f"{1e3 * statistics.fmean(fit['seconds_per_step'] for fit in done):.1f}"
        lines.append(f"{start} {' | '.join(cells)} | {steps} | {each} | {len(done)} of {len(fits)} |")
    beside = load("science/definition_flows_speed.json")
    notes = [f"- {_source(record)}; a step's time is that of this run, whose machine had other work"]
    if beside is not None:
        speeds = ", ".join(f"{row['kind']} {row['blocks']} blocks {row['speedup']:.1f}x" for row in beside["results"])
        notes.append(f"- beside FrEIA with torch's AdamW on the same batches: {speeds}: {_source(beside)}")
    return "\n".join([*lines, "", *notes])


#: Of the conditional VAE's variants: figure, title, form.
_LATENT = (
    ("reconstruction", "NLL of a response, nats", "{:.1f}"), ("kl", "KL", "{:.2f}"),
    ("mutual_information", "MI, joint", "{:.2f}"), ("marginal_mutual_information", "MI, marginal", "{:.2f}"),
    ("active_units_0.03", "AU .03", "{:.1f}"), ("active_units_0.1", "AU .1", "{:.1f}"),
    ("collapsed_units_0.03", "CU .03", "{:.1f}"), ("collapsed_units_0.1", "CU .1", "{:.1f}"),
)  # fmt: skip
_TEXTS = (
    ("prior_mauve", "MAUVE, prior", "{:.3f}"), ("prior_rouge_lsum", "ROUGE-Lsum, prior", "{:.3f}"),
    ("prior_distinct_4", "distinct-4, prior", "{:.3f}"), ("prior_self_bleu", "self-BLEU, prior", "{:.3f}"),
    ("posterior_mauve", "MAUVE, posterior", "{:.3f}"), ("posterior_rouge_lsum", "ROUGE-Lsum, posterior", "{:.3f}"),
    ("posterior_distinct_4", "distinct-4, posterior", "{:.3f}"), ("posterior_self_bleu", "self-BLEU, posterior", "{:.3f}"),
)  # fmt: skip


def penalties(figures: Sequence[tuple[str, str, str]]) -> str:
    """The conditional VAE's variants after equal steps on each set of prompts."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "science/penalties").glob("*.json"))}
    if not found:
        return "Not measured."
    lines, notes = [], []
    for name, record in found.items():
        lines += [f"| {name}: penalty, residual | {' | '.join(title for _, title, _ in figures)} | seeds |",
                  "|---" * (len(figures) + 2) + "|"]  # fmt: skip
        for (penalty, residual), runs in _grouped(record["runs"], ("penalty", "residual")).items():
            told = {
                figure: [run["figures"][figure] for run in runs if figure in run["figures"]] for figure, _, _ in figures
            }
            cells = [_mean(told[figure], form) for figure, _, form in figures]
            title = penalty if residual == "none" else f"{penalty} + {residual}"
            lines.append(f"| {title} | {' | '.join(cells)} | {len(runs)} |")
        lines.append("")
        notes.append(f"- {name}: {_source(record)}")
    return "\n".join([*lines, *notes])


TABLES: dict[str, Callable[[], str]] = {
    "definition-ways": definition_ways, "definition-flows": definition_flows,
    "penalties-latent": lambda: penalties(_LATENT), "penalties-texts": lambda: penalties(_TEXTS),
}  # fmt: skip
