"""Tables of the recorded training steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.common.records import load, where

SIDES = ("free-running fp32", "free-running bf16", "teacher-forced fp32", "teacher-forced bf16")


def _note(record: dict[str, Any]) -> str:
    return f"Machine: {where(record['machine'])}. Command: `{record['command']}`."


def against_langvae() -> str:
    """Table of times faster than LangVAE 0.6.13's step, peak memory of the process, and the differences, case by case."""
    record = load("training/steps/langvae.json")
    if record is None:
        return "Not measured."
    lines = [
        "| decoder, batch | side | step | times faster | peak memory | share of matrix rate | difference: loss, gradients |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["cases"]:
        difference, base = row["differences"], row["baseline"]
        for side in (base, *(side for side in SIDES if side in row["milliseconds"])):
            speedup, share = row["speedup"].get(side), row["share_of_matrix_rate"].get(side)
            exact = f"{difference['loss']:.0e}, {difference['gradients']:.0e}" if side == difference["sides"][0] else ""
            lines.append(
                f"| {row['shape']}, {row['batch']} | {side} | {row['milliseconds'][side]:,.0f} ms | "
                f"{f'{speedup:.1f}' if speedup else ''} | {row['peak_bytes'][side] / 1e9:.2f} GB | "
                f"{f'{share:.0%}' if share else ''} | {exact} |"
            )
    return "\n".join([*lines, "", _note(record)])


def against_eager() -> str:
    """Table of times faster than the eager reference's step, with its torch.compile beside it."""
    record = load("training/steps/eager.json")
    if record is None:
        return "Not measured."
    lines = [
        "| decoder, batch | ours | eager reference | its torch.compile | times faster than eager |", "|---|---|---|---|---|"
    ]  # fmt: skip
    for row in record["cases"]:
        ours, eager, compiled = (
            row["milliseconds"][side] for side in ("teacher-forced fp32", "eager", "torch.compile")
        )
        lines.append(
            f"| {row['shape']}, {row['batch']} | {ours:,.0f} ms | {eager:,.0f} ms | {compiled:,.0f} ms | "
            f"{row['speedup']['teacher-forced fp32']:.2f} |"
        )
    return "\n".join([*lines, "", _note(record)])


def compiled_body() -> str:
    """Table of our step with the decoder's layers under torch.compile and without."""
    record = load("training/steps/body.json")
    if record is None:
        return "Not measured."
    lines = ["| decoder, batch | precision | step | with `compile` | times faster |", "|---|---|---|---|---|"]
    for row in record["cases"]:
        for precision in ("fp32", "bf16"):
            plain, compiled = (
                row["milliseconds"][f"{side} {precision}"] for side in ("teacher-forced", "compiled body")
            )
            times = f"{plain:,.0f} ms | {compiled:,.0f} ms | {plain / compiled:.2f}"
            lines.append(f"| {row['shape']}, {row['batch']} | {precision} | {times} |")
    return "\n".join([*lines, "", _note(record)])


def memory() -> str:
    """Table of a step's memory, stage by stage, with LangVAE's peak beside it."""
    record, peer = load("training/memory.json"), load("training/steps/langvae.json")
    if record is None:
        return "Not measured."
    lines = ["| | " + " | ".join(record["variants"]) + " |", "|---|" + "---|" * len(record["variants"])]
    variants = list(record["variants"].values())

    def row(name: str, values: list[int]) -> None:
        lines.append(f"| {name} | " + " | ".join(f"{value / 1e9:.2f} GB" for value in values) + " |")

    stages = [{name: sum(parts.values()) for name, parts in one["stages"].items()} for one in variants]
    row("libraries", [one["libraries"] for one in stages])
    for part in variants[0]["weights_and_moments"]:
        row(part, [one["weights_and_moments"][part] for one in variants])
    row("process after steps", [one["after steps"] for one in stages])
    row("peak of the process", [one["peak_bytes"] for one in variants])
    if peer is not None:
        case = next(c for c in peer["cases"] if (c["shape"], c["batch"]) == (record["shape"], record["batch"]))
        theirs = case["peak_bytes"]["LangVAE"]
        lines += ["", f"LangVAE's process peaks at {theirs / 1e9:.2f} GB, a third of which is {theirs / 3e9:.2f} GB."]
    return "\n".join([*lines, "", f"{record['shape']}, batch {record['batch']}. {_note(record)}"])


def learning() -> str:
    """Table of every side's held-out figures at each mark of CPU time."""
    record = load("training/learning.json")
    if record is None:
        return "Not measured."
    lines = [
        "| CPU time | side | steps | reconstruction | BLEU-4 | KL | active units |",
        "|---|---|---|---|---|---|---|",
    ]
    for points in zip(*record["sides"].values(), strict=True):
        for side, point in zip(record["sides"], points, strict=True):
            lines.append(
                f"| {point['cpu_seconds'] / 60:.0f} min | {side} | {point['steps']:,} | {point['reconstruction']:.1f} nats | "
                f"{point['bleu']:.3f} | {point['kl']:.1f} nats | {point['active_units']} |"
            )
    sentences = f"{record['train_sentences']:,} sentences, {record['held_out_sentences']} held out"
    return "\n".join([*lines, "", f"{sentences}. Machine: {where(record['machine'])}. Command: `{record['command']}`."])


TABLES: dict[str, Callable[[], str]] = {
    "steps-langvae": against_langvae,
    "steps-eager": against_eager,
    "steps-body": compiled_body,
    "memory": memory,
    "learning": learning,
}
