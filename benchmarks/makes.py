"""The same figures of processors of several makes side by side, from their records.

Records of the first machine stand in benchmarks/results/; those of another make in benchmarks/results/<make>/ by the same
names, written by the same commands with `--output benchmarks/results/<make>/...`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.common.records import RESULTS, load, where

SHAPE = "gpt2-small"
#: Folders of further makes below benchmarks/results/, and what their processors are.
MAKES = {
    "": "Intel, AMX", "amd-zen4": "AMD Zen 4, AVX-512 with bf16, no AMX", "amd-zen3": "AMD Zen 3, AVX2",
}  # fmt: skip


def _rows(record: dict[str, Any] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Batch and row of a comparison of steps or of decoding, of our shape."""
    for row in (record or {}).get("cases", (record or {}).get("rows", ())):
        if row.get("shape", SHAPE) == SHAPE and "batch" in row:
            yield row["batch"], row


def _figures(folder: str) -> dict[str, str]:
    """Text of every figure one make's records have, by what it is of."""
    found = {}
    of = f"{folder}/" if folder else ""
    for name, title, share in (
        ("training/steps/langvae", "training step, LangVAE", "share_of_matrix_rate"),
        ("training/steps/eager", "training step, eager reference", "share_of_matrix_rate"),
        ("generation/langvae", "decoding, LangVAE", "share_of_limit"),
        ("generation/transformers", "decoding, transformers.generate", "share_of_limit"),
        ("generation/transformers-llama-160m", "decoding of llama-160m, transformers.generate", "share_of_limit"),
        ("generation/weights", "decoding, wider weights", "share_of_limit"),
        ("generation/calls", "decoding, layers called one by one", "share_of_limit"),
        ("generation/adapters-smollm2-135m", "decoding, SmolLM2's shape with adapters beside", "share_of_limit"),
    ):
        for batch, row in _rows(load(f"{of}{name}.json")):
            for side, factor in row["speedup"].items():
                if side != row["baseline"]:
                    part = row[share].get(side)
                    found[f"{title} | {side} | {batch}"] = f"{factor:.2f}" + (f" ({part:.0%})" if part else "")
    for file in sorted((RESULTS / folder / "kernels").glob("*.json")):
        for case in (load(str(file.relative_to(RESULTS))) or {}).get("cases", ()):
            if isinstance(case.get("speedup"), (int, float)):
                found[f"op {file.stem} | {case['name']} |"] = f"{case['speedup']:.2f}"
    return found


def makes() -> str:
    """Times faster on each make, with the share of its own limit; a blank where one has no record."""
    by_make = {title: _figures(folder) for folder, title in MAKES.items()}
    lines = [
        "| work, against | side | batch | " + " | ".join(by_make) + " |", "|---|---|---|" + "---|" * len(by_make)
    ]  # fmt: skip
    names = {name: None for figures in by_make.values() for name in figures}
    later = list(by_make.values())[1:]
    for name in names:
        if any(name in figures for figures in later):
            lines.append(f"| {name} | " + " | ".join(figures.get(name, "") for figures in by_make.values()) + " |")
    notes = []
    for folder, title in MAKES.items():
        of = f"{folder}/" if folder else ""
        record = load(f"{of}training/steps/langvae.json") or load(f"{of}generation/langvae.json")
        notes.append(f"- {title}: {where(record['machine']) if record else 'not measured'}")
        for file in sorted((RESULTS / folder / "kernels").glob("*.json")):
            op = load(str(file.relative_to(RESULTS))) or {}
            if "machine" in op and any(name.startswith(f"op {file.stem} |") for figures in later for name in figures):
                notes.append(f"- {title}, {file.stem}: {where(op['machine'])}")
    return "\n".join([*lines, "", *notes])


TABLES: dict[str, Callable[[], str]] = {"makes": makes}
