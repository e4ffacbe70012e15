"""Memory of a teacher-forced fp32 training step: resident bytes of a process, stage by stage.

    python -m benchmarks.training.memory [--shape gpt2-small] [--batch 32] [--data FILE]

Stages: the libraries are imported; the models are loaded and the features computed; steps are taken. The process's peak is
beside them, and what must be held in any case: weights of the decoder, of what trains, and AdamW's two moments in fp32.
Every variant is a process of its own. Writes benchmarks/results/training/memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common.worker import peak_bytes

VARIANTS: dict[str, dict[str, Any]] = {"as it is": {}, "recompute_decoder": {"recompute_decoder": True}}
STEPS = 3


def resident() -> dict[str, int]:
    """Bytes of this process that are in memory: its own, and pages of files that it only reads."""
    names = {"RssAnon": "own", "RssFile": "of_files"}
    with open("/proc/self/status", encoding="utf-8") as status:
        lines = [line.split() for line in status]
    return {names[name[:-1]]: int(rest[0]) * 1024 for name, *rest in lines if name[:-1] in names}


def measure_variant(file: str, options: dict[str, Any]) -> dict[str, Any]:
    """The stages of one variant, in this process."""
    from benchmarks.training.our_side import OurSide

    stages = {"libraries": resident()}
    side = OurSide(json.loads(Path(file).read_text()), "teacher-forced", "fp32", **options)
    stages["models, features, optimizer"] = resident()
    for _ in range(STEPS):
        side.step()
    stages["after steps"] = resident()
    model = side.model
    sizes = {name: sum(p.nbytes for p in getattr(model, name).parameters()) for name in ("encoder", "decoder")}
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    held = {**sizes, "what trains": trained, "its two moments": 2 * trained}
    return {"stages": stages, "peak_bytes": peak_bytes(), "weights_and_moments": held}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gpt2-small")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--data", type=Path, help="default: the bundled corpus")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=2, metavar=("CASE", "OPTIONS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure_variant(options.child[0], json.loads(options.child[1]))))
        return 0

    import lmvae_fast as lf
    from benchmarks.common.cases import make_case
    from benchmarks.common.records import RESULTS, write
    from lmvae_fast.data.corpus import generate_corpus
    from lmvae_fast.profiling.measure import machine

    lines = lf.read(options.data).texts if options.data else generate_corpus(4000).texts
    record: dict[str, Any] = {
        "command": "python -m benchmarks.training.memory " + " ".join(sys.argv[1:]), "machine": machine("cpu"),
        "shape": options.shape, "batch": options.batch, "variants": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = make_case(Path(folder), options.shape, lines, options.batch, options.threads)
        for name, extra in VARIANTS.items():
            command = [sys.executable, "-m", "benchmarks.training.memory", "--child", str(file), json.dumps(extra)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            record["variants"][name] = json.loads(done.stdout.splitlines()[-1])
            print(name, record["variants"][name])
    write(record, RESULTS / "training" / "memory.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
