"""Tables of decoding speed, from benchmarks/results/generation/."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.common.records import RESULTS, load, where

AGAINST = {"langvae": "LangVAE 0.6.13", "transformers": "transformers.generate", "eager": "eager reference"}


def _records(name: str) -> Iterator[dict[str, Any]]:
    """Records of a comparison: GPT-2's shape first, then other shapes."""
    files = [f"{name}.json", *sorted(path.name for path in (RESULTS / "generation").glob(f"{name}-*.json"))]
    yield from filter(None, (load(f"generation/{file}") for file in files))


def _pair(values: dict[str, float], ours: str, theirs: str, factor: float, digits: int) -> str:
    """Text ``ours / theirs``; empty where nothing was measured."""
    texts = [f"{values[name] * factor:,.{digits}f}" if name in values else "-" for name in (ours, theirs)]
    return "" if texts == ["-", "-"] else " / ".join(texts)


def _note(title: str, record: dict[str, Any]) -> str:
    work = f"{record['shape']}, {record['tokens']} tokens"
    return f"- {title}: `{record['command']}`, {work} ({where(record['machine'])})"


def generation() -> str:
    """Sentences per second and how many times faster, by baseline, decoder and batch."""
    lines = [
        "| against | decoder | batch | ours | sentences/s | theirs | times faster | by processor time | share of the limit | "
        "first token, ms | peak memory, GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name, title in AGAINST.items():
        records = list(_records(name))
        if not records:
            lines.append(f"| {title} | | | not measured | | | | | | | |")
        for record in records:
            lines += [line for row in record["rows"] for line in _lines(title, record, row)]
            notes.append(_note(title, record))
    lines += ["", "First token and peak memory: ours / theirs; memory is that of the whole process, up to this batch."]
    return "\n".join([*lines, "", *notes])


def _lines(title: str, record: dict[str, Any], row: dict[str, Any]) -> Iterator[str]:
    rates, last = row["sentences_per_second"], row is record["rows"][-1]
    peaks = row.get("peak_bytes") or (record["peak_bytes"] if last else {})
    for side, speedup in row["speedup"].items():
        base = row["baseline"][side]
        yield (
            f"| {title} | {record['shape']} | {row['batch']} | {side} | {rates[side]:.2f} | {rates[base]:.2f} ({base}) | "
            f"{speedup:.2f} | {row['cpu_speedup'][side]:.2f} | {row['share_of_limit'][side]:.0%} | "
            f"{_pair(row['first_token_seconds'], side, base, 1e3, 0)} | {_pair(peaks, side, base, 1e-9, 2)} |"
        )


def body() -> str:
    """Table of the forms of the decoder's layers: Hugging Face's modules, these compiled, these over packed weights."""
    records = list(_records("body"))
    if not records:
        return "Not measured."
    lines = [
        "| decoder | batch | precision | modules as they are, sentences/s | under torch.compile | with packed weights | "
        "compiled, times faster | packed, times faster | share of the limit, packed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        for row in record["rows"]:
            for precision in ("fp32", "bf16"):
                plain, compiled, packed = (f"{form} {precision}" for form in ("plain", "compiled", "packed"))
                rates = " | ".join(f"{row['sentences_per_second'][side]:.2f}" for side in (plain, compiled, packed))
                lines.append(
                    f"| {record['shape']} | {row['batch']} | {precision} | {rates} | {row['speedup'][compiled]:.2f} | "
                    f"{row['speedup'][packed]:.2f} | {row['share_of_limit'][packed]:.0%} |"
                )
    return "\n".join([*lines, "", *(_note("body", record) for record in records)])


def sampling() -> str:
    """Table of what a draw adds to a step that makes the same logits, and to a greedy one, which needs none."""
    steps = {"greedy": "all logits, the largest taken", "engine": "greedy decoding, which makes no logits"}
    record = load("generation/sampling.json")
    if record is None:
        return "Not measured."
    lines = ["| batch | precision | top-p 0.9 over | elapsed | by processor time |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        for side, ratio in row["speedup"].items():
            step, precision = side.split()
            figures = f"{ratio - 1:+.1%} | {row['cpu_speedup'][side] - 1:+.1%}"
            lines.append(f"| {row['batch']} | {precision} | {steps[step]} | {figures} |")
    return "\n".join([*lines, "", f"`{record['command']}`, {record['shape']} ({where(record['machine'])})"])


def beginnings() -> str:
    """Table of what beginning a batch costs, beside the plain way."""
    record = load("generation/beginnings.json")
    if record is None:
        return "Not measured."
    plain = {
        "memory": ("memory projected into the cache", "into a tensor of its own, then copied"),
        "prompt": (f"prompt of {record['prompt']} tokens in one pass", "token by token"),
    }
    lines = [
        "| work | against | visibility | precision | times faster | by processor time |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        work = " | ".join(plain[row["what"]])
        figures = f"{row['visibility']} | {row['precision']} | {row['speedup']:.2f} | {row['cpu_speedup']:.2f}"
        lines.append(f"| {work} | {figures} |")
    work = f"{record['shape']}, batch {record['batch']}"
    return "\n".join([*lines, "", f"`{record['command']}`, {work} ({where(record['machine'])})"])


def calls() -> str:
    """Table of what a step's layers gain as one call, by decoder, batch and weights."""
    return _pairs("calls", "weights", "layers one by one", "one call")


def adapters() -> str:
    """Table of what a decoder with low-rank adapters gains where these are added to packed weights."""
    return _pairs("adapters", "precision", "modules with adapters beside", "adapters added to packed weights")


def _pairs(kind: str, what: str, without: str, with_it: str) -> str:
    """Table of a comparison in which every side has one baseline; ``what``: the word that sides differ by."""
    records = list(_records(kind))
    if not records:
        return "Not measured."
    lines = [
        f"| decoder | batch | {what} | {without}, sentences/s | {with_it} | times faster | share of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        for row in record["rows"]:
            for side, base in row["baseline"].items():
                rates = " | ".join(f"{row['sentences_per_second'][name]:.2f}" for name in (base, side))
                figures = f"{rates} | {row['speedup'][side]:.2f} | {row['share_of_limit'][side]:.0%} |"
                lines.append(f"| {record['shape']} | {row['batch']} | {side.partition(' ')[2]} | {figures}")
    return "\n".join([*lines, "", *(_note(kind, record) for record in records)])


def weights() -> str:
    """Table of decoding over weights of 32, 16 and 8 bits."""
    records = list(_records("weights"))
    if not records:
        return "Not measured."
    lines = [
        "| decoder | batch | weights | sentences/s | times faster | than | share of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        for row in record["rows"]:
            for side, rate in row["sentences_per_second"].items():
                factor = f"{row['speedup'][side]:.2f}" if side in row["speedup"] else ""
                base = row["baseline"].get(side, "").removeprefix("engine ")
                lines.append(
                    f"| {record['shape']} | {row['batch']} | {side.removeprefix('engine ')} | {rate:.2f} | {factor} | {base} | "
                    f"{row['share_of_limit'][side]:.0%} |"
                )
    return "\n".join([*lines, "", *(_note("weights", record) for record in records)])


TABLES: dict[str, Callable[[], str]] = {
    "generation": generation, "generation-body": body, "generation-calls": calls, "generation-adapters": adapters,
    "generation-weights": weights, "sampling": sampling, "beginnings": beginnings,
}  # fmt: skip
