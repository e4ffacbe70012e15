"""What a fitted flow says of some words: benchmarks/results/science/definitions/words.json.

    lmvae-fast fit-flow runs/science/definitions/vae/model --data runs/definitions/all.tsv --vectors glove --epochs 60 \\
        --early-stop 6 --kind allinone --output runs/flow
    python -m benchmarks.science.defined_words runs/flow doctor planet river
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.common.records import RESULTS, write
from lmvae_fast.cli.definitions import load_flow
from lmvae_fast.profiling.measure import machine


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flow", type=Path, help="folder that fit-flow wrote")
    parser.add_argument("words", nargs="+")
    options = parser.parse_args()
    model = load_flow(options.flow)
    glosses = model.define(options.words)
    record = {
        "command": f"python -m benchmarks.science.defined_words {' '.join(sys.argv[1:])}", "machine": machine("cpu"),
        "glosses": dict(zip(options.words, glosses, strict=True)),
    }  # fmt: skip
    write(record, RESULTS / "science" / "definitions" / "words.json")
    print(record["glosses"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
