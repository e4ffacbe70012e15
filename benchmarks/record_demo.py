"""Run the demonstration and record what it reached.

    python -m benchmarks.record_demo

writes benchmarks/results/demo.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.kernels.harness import machine
from lmvae_fast.kernels import backend

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    """Command line."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "lmvae_fast.cli", "demo", "--output", folder], check=True)
        figures = json.loads((Path(folder) / "figures.json").read_text())
    record = {
        "command": "python -m benchmarks.record_demo", "machine": machine("cpu"), "extension": backend.extension()[1],
        "figures": figures,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "demo.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
