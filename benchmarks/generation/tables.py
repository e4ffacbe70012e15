"""Tables of decoding speed, from benchmarks/results/generation/."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.records import load, where

AGAINST = {"langvae": "LangVAE 0.6.13", "transformers": "transformers.generate", "eager": "eager reference"}


def generation() -> str:
    """Sentences per second and how many times faster, by batch and baseline."""
    lines = [
        "| against | batch | ours | sentences/s | theirs | times faster | by processor time | share of the limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name, title in AGAINST.items():
        record = load(f"generation/{name}.json")
        if record is None:
            lines.append(f"| {title} | | not measured | | | | | |")
            continue
        for row in record["rows"]:
            rates = row["sentences_per_second"]
            for side, speedup in row["speedup"].items():
                base = row["baseline"][side]
                lines.append(
                    f"| {title} | {row['batch']} | {side} | {rates[side]:.2f} | {rates[base]:.2f} ({base}) | {speedup:.2f} | "
                    f"{row['cpu_speedup'][side]:.2f} | {row['share_of_limit'][side]:.0%} |"
                )
        work = f"{record['shape']}, {record['tokens']} tokens"
        notes.append(f"- {title}: `{record['command']}`, {work} ({where(record['machine'])})")
    return "\n".join([*lines, "", *notes])


def sampling() -> str:
    """What drawing adds to a greedy step."""
    record = load("generation/sampling.json")
    if record is None:
        return "Not measured."
    lines = ["| batch | precision | top-p 0.9 over greedy, elapsed | by processor time |", "|---|---|---|---|"]
    for row in record["rows"]:
        for side, ratio in row["speedup"].items():
            lines.append(
                f"| {row['batch']} | {side.split()[-1]} | {ratio - 1:+.1%} | {row['cpu_speedup'][side] - 1:+.1%} |"
            )
    return "\n".join([*lines, "", f"`{record['command']}`, {record['shape']} ({where(record['machine'])})"])


TABLES: dict[str, Callable[[], str]] = {"generation": generation, "sampling": sampling}
