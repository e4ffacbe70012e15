"""The table of docs/distributed.md from the record of bench_scaling."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.common.records import load, where


def scaling() -> str:
    """Processes, then one line per size."""
    record = load("training/scaling.json")
    if record is None:
        return "Not measured."
    base, sent = record["base"], record["exchanged_bytes"]
    lines = ["| processes, one thread each | step | tokens/s | tokens/s per process |", "|---|---|---|---|"]
    for row in record["processes"]:
        lines.append(
            f"| {row['processes']} | {row['seconds'] * 1e3:,.1f} ms | {row['tokens_per_s']:,.0f} | "
            f"{row['tokens_per_s_per_process']:,.0f} |"
        )
    lines += [
        "", f"Processes share one batch of {base['batch']} sentences of {base['length']} tokens. The projector's factors bring "
        f"{sent['factors'] / 2**20:.1f} MiB a step to a process; its gradient would be {sent['gradient'] / 2**20:.1f} MiB.", "",
        "| varied | value | step | tokens/s | weights and state | peak beside them |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for axis, rows in record["sizes"].items():
        for row in rows:
            lines.append(
                f"| {axis} | {row[axis]} | {row['seconds'] * 1e3:,.1f} ms | {row['tokens_per_s']:,.0f} | "
                f"{row['held_bytes'] / 2**20:,.0f} MiB | {row['extra_bytes'] / 2**20:,.0f} MiB |"
            )
    lines += [
        "", f"One process; around batch {base['batch']}, {base['length']} tokens a sentence, a latent of {base['latent']} and "
        f"{base['layers']} layers of a GPT-2 256 wide with 8,000 tokens. Machine: {where(record['machine'])}. "
        f"Command: `{record['command']}`.",
    ]  # fmt: skip
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"scaling": scaling}
