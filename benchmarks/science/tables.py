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


TABLES: dict[str, Callable[[], str]] = {"demo": demo, "interpolation": interpolation, "training": training}
