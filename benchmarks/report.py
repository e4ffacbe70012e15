"""Tables of README.md and docs, made from the JSON files under benchmarks/results/ and from nothing else.

    python -m benchmarks.report            # rewrite what stands between <!-- begin:NAME --> and <!-- end:NAME -->
    python -m benchmarks.report --check    # exit 1 if a file does not say what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable

from benchmarks.common.records import RESULTS, ROOT, load, where
from benchmarks.compute.tables import TABLES as COMPUTE_TABLES
from benchmarks.generation.long_run_table import TABLES as LONG_RUN_TABLES
from benchmarks.generation.tables import TABLES as GENERATION_TABLES
from benchmarks.training.scaling_tables import TABLES as SCALING_TABLES
from benchmarks.training.tables import TABLES as STEP_TABLES

FILES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
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
                lines.append(f"| {op} | {case['name']} | {case['baseline']} | {case['speedup']:.2f} | {case['floor']} |")
    lines += ["", *(f"Machine: {name}." for name in machines), "CUDA: not measured." if not load("gpu/summary.json") else ""]
    return "\n".join(lines).rstrip()


def demo() -> str:
    """What the demonstration reached and how long it took."""
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
    """The interpolation the recorded demonstration printed."""
    record = load("demo.json")
    if record is None:
        return "Not measured."
    rows = record["figures"]["interpolation"]
    return "\n".join(["```", *(f"{row['weight']:.2f}  {row['text']}" for row in rows), "```"])


def training() -> str:
    """The recorded training runs."""
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


TABLES: dict[str, Callable[[], str]] = {"kernels": kernels, "demo": demo, "interpolation": interpolation, "training": training}
TABLES |= COMPUTE_TABLES | GENERATION_TABLES | LONG_RUN_TABLES | SCALING_TABLES | STEP_TABLES


def filled(text: str) -> str:
    """The text with every marked table made anew."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- begin:{name} -->\n).*?(\n?<!-- end:{name} -->)", re.S)
        if pattern.search(text):
            text = pattern.sub(lambda match, table=table: match[1] + table() + "\n" + match[2].lstrip("\n"), text)
    return text


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path in FILES:
        if path.is_file() and (new := filled(old := path.read_text())) != old:
            stale.append(path)
            if not check:
                path.write_text(new)
    for path in stale:
        print(f"{'stale' if check else 'updated'}: {path.relative_to(ROOT)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
