"""Reading what benchmarks recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(path: str) -> dict[str, Any] | None:
    """The record at ``path`` below benchmarks/results, or None if nothing has been recorded there."""
    file = RESULTS / path
    return json.loads(file.read_text()) if file.is_file() else None


def where(machine: dict[str, Any]) -> str:
    """Machine, versions and commit of a record, for people."""
    return (f"{machine['cpu']} ({machine['cpu_isa']}), {machine['threads']} threads, torch {machine['torch']}, "
            f"commit {machine['commit'][:12]}, {machine['date'][:10]}")  # fmt: skip
