"""The table of the ops, from benchmarks/results/kernels/."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.common.records import load, where

OPS = (
    "posterior", "latent_kv", "latent_attention", "lm_head_loss", "coupling_flow", "sample_token", "packed_linear",
    "greedy_head",
)  # fmt: skip


def kernels() -> str:
    """Every op against its baseline, one line per case that has a floor."""
    lines = ["| op | case | against | times faster | goal |", "|---|---|---|---|---|"]
    machines = {}
    for op in OPS:
        record = load(f"kernels/{op}.json")
        if record is None:
            lines.append(f"| {op} | | | not measured | |")
            continue
        machines[where(record["machine"])] = None
        for case in record["cases"]:
            if case.get("floor"):
                lines.append(
                    f"| {op} | {case['name']} | {case['baseline']} | {case['speedup']:.2f} | {case['floor']} |"
                )
    lines += [
        "",
        *(f"Machine: {name}." for name in machines),
        "CUDA: not measured." if not load("gpu/summary.json") else "",
    ]
    return "\n".join(lines).rstrip()


TABLES: dict[str, Callable[[], str]] = {"kernels": kernels}
