"""Records of benchmarks, written and read: one JSON file each below benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def write(record: dict[str, Any], file: Path) -> None:
    """The record into ``file``; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")


def load(path: str) -> dict[str, Any] | None:
    """The record at ``path`` below benchmarks/results, or None if nothing has been recorded there."""
    file = RESULTS / path
    return json.loads(file.read_text()) if file.is_file() else None


def where(machine: dict[str, Any]) -> str:
    """Machine, versions and commit of a record, for people."""
    return (f"{machine['cpu']} ({machine['cpu_isa']}), {machine['threads']} threads, torch {machine['torch']}, "
            f"commit {machine['commit'][:12]}, {machine['date'][:10]}")  # fmt: skip
