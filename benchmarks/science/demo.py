"""Run the demonstration and record the figures that it reached.

    python -m benchmarks.science.demo

writes benchmarks/results/demo.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common.records import RESULTS, write
from lmvae_fast.kernels import backend
from lmvae_fast.profiling.measure import machine


def main() -> None:
    """Command line."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "lmvae_fast.cli", "demo", "--output", folder], check=True)
        figures = json.loads((Path(folder) / "figures.json").read_text())
    record = {
        "command": "python -m benchmarks.science.demo", "machine": machine("cpu"), "extension": backend.extension()[1],
        "figures": figures,
    }  # fmt: skip
    write(record, RESULTS / "demo.json")


if __name__ == "__main__":
    main()
