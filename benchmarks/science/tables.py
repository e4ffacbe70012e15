"""Tables of quality: the demonstration, and the recorded training runs."""

from __future__ import annotations

import json
from collections.abc import Callable

from benchmarks.common.records import RESULTS, load, where


def demo() -> str:
    """Table of the figures that the demonstration reached."""
    record = load("demo.json")
    if record is None:
        return "Not measured."
    figures, parity = record["figures"], record["figures"]["parity"]
    rows = [
        ("held-out BLEU-4", f"{figures['bleu']:.3f}"),
        ("held-out sentences reproduced word for word", f"{figures['exact_match']:.1%}"),
        ("KL to the prior, active dimensions", f"{figures['kl']:.1f} nats, {figures['active_units']}"),
        ("whole demonstration", f"{figures['seconds']:.0f} s"),
        ("loss against the eager reference", f"{parity['loss_difference']:.1e} relative difference"),
        ("gradients against the eager reference", f"{parity['gradient_difference']:.1e} of the largest"),
        ("greedy tokens against the eager reference", "identical" if parity["same_greedy_tokens"] else "different"),
        ("training step, reading its own greedy output", f"{parity['free_running_speedup']:.1f}x the eager reference"),
        ("training step, teacher forcing", f"{parity['teacher_forced_speedup']:.1f}x the eager reference"),
        ("decoding", f"{parity['decode_speedup']:.1f}x the eager reference"),
    ]
    lines = ["| figure | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join([*lines, "", f"Machine: {where(record['machine'])}. Command: `{record['command']}`."])


def interpolation() -> str:
    """Text that the recorded demonstration printed for an interpolation."""
    record = load("demo.json")
    if record is None:
        return "Not measured."
    rows = record["figures"]["interpolation"]
    return "\n".join(["```", *(f"{row['weight']:.2f}  {row['text']}" for row in rows), "```"])


def training() -> str:
    """Table of the recorded training runs."""
    lines = ["| data | sentences | BLEU-4 | exact | KL | active units | reconstruction per token | training |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    notes = []
    for path in sorted((RESULTS / "training").glob("*.json")):
        record = json.loads(path.read_text())
        held = record.get("held_out")
        if held is None:
            continue
        lines.append(
            f"| {path.stem} | {record['train_sentences']:,} | {held['bleu']:.3f} | {held['exact_match']:.1%} | "
            f"{held['kl']:.1f} | {held['active_units']} of {held['latent_dim']} | "
            f"{held['reconstruction_per_token']:.2f} nats | {record['train_seconds']:.0f} s |"
        )
        notes.append(f"- {path.stem}: `{record['command']}` ({where(record['machine'])})")
    return "\n".join([*lines, "", *notes]) if notes else "Not measured."


def recipes(folder: str = "science", first: str = "recipe") -> str:
    """Held-out figures of every recorded recipe over minutes of CPU time, and what its last training steps had."""
    found = _records(folder)
    if not found:
        return "Not measured."
    lines = _head(first)
    for name, record in found.items():
        rows = [(point, "") for point in record["points"]]
        if "final" in record:
            rows.append((record["final"] | {"step": record["final"]["steps"]}, f"{record['final']['sentences']:,}"))
        lines += [_row(name, point, last) for point, last in rows]
    trained = {name: [row["reconstruction"] for row in record["training"][-10:]] for name, record in found.items()}
    notes = [
        f"{name}: in its last {len(rows)} logged training steps {sum(rows) / len(rows):.1f} nats a sentence."
        for name, rows in trained.items() if rows
    ]  # fmt: skip
    return "\n".join([*lines, "", *notes, "", *_commands(found)])


def screens() -> str:
    """Figures of changes to a recipe after equal steps."""
    found = _records("science/screens")
    if not found:
        return "Not measured."
    lines = _head("change")
    for name, record in sorted(found.items(), key=lambda item: item[1]["final"]["reconstruction"]):
        final = record["final"]
        lines.append(_row(name, final | {"step": final["steps"]}, f"{final['sentences']:,}"))
    return "\n".join([*lines, "", *_commands(found)])


def finalists() -> str:
    """The best changes at equal minutes: each figure's mean over the seeds, and the least and the most."""
    found = _records("science/finalists")
    by_name: dict[str, list[dict]] = {}
    for name, record in found.items():
        if "final" in record:
            by_name.setdefault(name.rpartition("-")[0], []).append(record)
    if not by_name:
        return "Not measured."
    columns = ("preset with", "seeds", "CPU minutes", "steps", "BLEU-4", "reconstruction, nats", "KL", "active units")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]

    def cell(values: list[float], digits: int) -> str:
        mean = f"{sum(values) / len(values):.{digits}f}"
        return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else mean

    for name, records in sorted(
        by_name.items(), key=lambda item: -sum(r["final"]["bleu"] for r in item[1]) / len(item[1])
    ):
        finals = [record["final"] for record in records]
        cells = [cell([final[key] for final in finals], digits) for key, digits in (
            ("cpu_minutes", 1), ("steps", 0), ("bleu", 3), ("reconstruction", 1), ("kl", 0), ("active_units", 0),
        )]  # fmt: skip
        lines.append(f"| {name} | {len(records)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_commands(found)])


def minutes() -> str:
    """Systems after the same minutes on the same pretrained decoder and encoder: the last point of each one's curve."""
    found = _records("science/minutes")
    learning = load("training/learning-smollm2.json")
    if not found and learning is None:
        return "Not measured."
    lines = _head("system")
    for name, record in found.items():
        last, final = record["points"][-1], record.get("final", {})
        if final.get("steps", 0) > last["step"]:  # its steps were done before its minutes
            lines.append(_row(name, final | {"step": final["steps"]}, f"{final['sentences']:,}"))
        else:
            lines.append(_row(name, last, f"{record.get('sentences_of_a_point', 200):,}"))
    notes = _commands(found)
    if learning is not None:
        for side, points in learning["sides"].items():
            last = points[-1]
            lines.append(
                f"| {side} | {last['cpu_seconds'] / 60:.1f} | {last['steps']} | {last['bleu']:.3f} | | "
                f"{last['reconstruction']:.1f} | {last['kl']:.0f} | {last['active_units']} | "
                f"{learning['held_out_sentences']:,} |"
            )
        notes.append(f"- LangVAE and its own objectives: `{learning['command']}` ({where(learning['machine'])})")
    return "\n".join([*lines, "", *notes])


def encoder_layers() -> str:
    """What a linear map finds of a sentence's words in each layer of the encoder."""
    record = load("science/encoder_layers.json")
    if record is None:
        return "Not measured."
    lines = ["| layer, pooling | words found | tokens in place |", "|---|---|---|"]
    lines += [f"| {name} | {row['words']:.1%} | {row['places']:.1%} |" for name, row in record["rows"].items()]
    return "\n".join([*lines, "", f"Machine: {where(record['machine'])}. Command: `{record['command']}`."])


def probes() -> str:
    """How long probes take: each metric beside a loop over pairs, and every probe of a report."""
    record = load("science/probes_speed.json")
    if record is None:
        return "Not measured."
    metrics, report = record["metrics"], record["report"]
    of = f"{metrics['rows']:,} rows, {metrics['dims']} dimensions, {metrics['factors']} factors"
    lines = [f"| metric of {of} | seconds | a loop's | times faster |", "|---|---|---|---|"]
    for name, row in metrics.items():
        if isinstance(row, dict):
            loop = row.get("loop_seconds")
            told = f"{loop:,.1f} | {loop / row['seconds']:,.0f}" if loop else " | "
            lines.append(f"| {name} | {row['seconds']:,.2f} | {told} |")
    lines += ["", f"| probe of {report['sentences']:,} sentences, {report['dims']} dimensions | seconds |", "|---|---|"]
    lines += [
        f"| {name} | {seconds:,.1f} |" for name, seconds in report["seconds"].items() if name not in report["skipped"]
    ]
    lines.append(f"| all, encoding apart | {report['seconds_after_encoding']:,.1f} |")
    return "\n".join([*lines, "", f"Machine: {where(record['machine'])}. Command: `{record['command']}`."])


#: Of the tables of probed models: section and figure of a record, how the figure is called and written.
_PROBED = (
    ("overview", "active_units", "active units", "{:.0f}"), ("overview", "kl", "KL, nats", "{:.0f}"),
    ("overview", "effective_dimensions", "effective dimensions", "{:.0f}"),
    ("disentanglement", "mig", "MIG", "{:.3f}"), ("disentanglement", "modularity", "modularity", "{:.2f}"),
    ("disentanglement", "explicitness", "explicitness", "{:.2f}"), ("disentanglement", "sap", "SAP", "{:.3f}"),
    ("disentanglement", "dci_disentanglement", "DCI disentanglement", "{:.2f}"),
    ("disentanglement", "dci_completeness", "DCI completeness", "{:.2f}"),
    ("disentanglement", "dci_informativeness", "DCI informativeness", "{:.2f}"),
    ("disentanglement", "z_diff", "z-diff", "{:.2f}"), ("disentanglement", "z_min_var", "z-min-var", "{:.2f}"),
    ("neighbourhoods", "kept_neighbours", "neighbours kept of the encoder's", "{:.2f}"),
    ("reconstruction", "bleu", "BLEU of reconstruction", "{:.1f}"),
    ("reconstruction", "exact_match", "reproduced word for word", "{:.1%}"),
    ("generation", "mauve", "MAUVE of draws from the prior", "{:.3f}"),
    ("generation", "frechet_distance", "Frechet distance of the same", "{:.3f}"),
    ("generation", "self_bleu", "self-BLEU of the same", "{:.3f}"),
    ("interpolation", "smoothness", "interpolation smoothness", "{:.3f}"),
    ("sts", "spearman_latent", "STS-B, Spearman", "{:.1f}"),
    ("sts", "share_kept", "share of the encoder's", "{:.2f}"),
    ("linguistic", "mean: latent", "ten linguistic tasks, mean accuracy", "{:.3f}"),
    ("linguistic", "mean: encoder", "the same of the encoder's vectors", "{:.3f}"),
)  # fmt: skip


def probed(folder: str) -> str:
    """Figures of the probed models of a folder of records, one column for each."""
    found = {path.stem: json.loads(path.read_text()) for path in (RESULTS / "science/probes" / folder).glob("*.json")}
    ours = RESULTS / "science/probes/latent_size/128.json"  # the preset as it is, which the others stand beside
    if found and folder != "latent_size" and ours.is_file():
        found["lmvae"] = json.loads(ours.read_text())
    if not found:
        return "Not measured."
    found = dict(sorted(found.items(), key=lambda item: (item[1]["model"].get("latent_dim", 0), item[0])))
    lines = [f"| figure | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    lines.append(f"| training steps | {' | '.join(str(record['steps']) for record in found.values())} |")
    for section, figure, title, form in _PROBED:
        scores = [record["figures"].get(section, {}).get(figure, {}) for record in found.values()]
        if any("value" in score for score in scores):
            lines.append(f"| {title} | {' | '.join(_figure(score, form) for score in scores)} |")
    ratios = [f"{record['fluency']['ratio']:.2f}" for record in found.values()]
    lines.append(f"| perplexity of an interpolation's middle over its ends' | {' | '.join(ratios)} |")
    notes = [
        f"- {name}: `{record['command']}` on the model of `{record['trained_by']}` ({where(record['machine'])}, "
        f"{record['data']['sentences']:,} held-out sentences)"
        for name, record in found.items()
    ]
    return "\n".join([*lines, "", *notes])


def _figure(score: dict, form: str) -> str:
    if "value" not in score:
        return ""
    return form.format(score["value"]) + (f" +- {form.format(score['spread'])}" if "spread" in score else "")


def reconstructions() -> str:
    """The first held-out sentences of the recorded worldtree recipe and what their latents decode to, unchosen."""
    record = load("science/worldtree.json")
    if record is None or not record["points"]:
        return "Not measured."
    point, width = record["points"][-1], record["model"]["latent_dim"]
    lines = [f"| held-out sentence | decoded from its latent of {width} numbers |", "|---|---|"]
    lines += [f"| {example['text']} | {example['decoded']} |" for example in point["examples"][:4]]
    whole = record.get("final", point)  # of all that was held out, where the run has come to its end
    caption = (
        f"SmolLM2-135M under [our preset](docs/systems/lmvae.md) after {point['cpu_minutes']:.0f} minutes of one core: BLEU-4 "
        f"{whole['bleu']:.2f} ([record](docs/results.md#recipes))."
    )
    return "\n".join([*lines, "", caption])


def _records(folder: str) -> dict[str, dict]:
    """Records of recipes in a folder by name; those of screens when they are done."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / folder).glob("*.json"))}
    recorded = {name: record for name, record in found.items() if "trainable_parameters" in record}
    return {name: record for name, record in recorded.items() if record["points"] or "final" in record}


def _head(first: str) -> list[str]:
    columns = (first, "CPU minutes", "steps", "BLEU-4", "exact", "reconstruction, nats (a token)", "KL", "active units",
               "held out")  # fmt: skip
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def _row(name: str, point: dict, held_out: str) -> str:
    return (
        f"| {name} | {point['cpu_minutes']:.1f} | {point['step']} | {point['bleu']:.3f} | {point['exact_match']:.1%} | "
        f"{point['reconstruction']:.1f} ({point['reconstruction_per_token']:.2f}) | {point['kl']:.0f} | "
        f"{point['active_units']} | {held_out} |"
    )


def _commands(found: dict[str, dict]) -> list[str]:
    return [f"- {name}: `{record['command']}` ({where(record['machine'])})" for name, record in found.items()]


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo, "interpolation": interpolation, "training": training, "recipes": recipes, "screens": screens,
    "finalists": finalists, "minutes": minutes, "reconstructions": reconstructions, "encoder-layers": encoder_layers,
    "whole-runs": lambda: recipes("science/whole", "change"), "probes": probes,
    "probed-systems": lambda: probed("minutes"), "probed-sizes": lambda: probed("latent_size"),
    "probed-labels": lambda: probed("labels"), "probed-whole": lambda: probed("whole"),
}  # fmt: skip
