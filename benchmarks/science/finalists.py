"""The best of the screens beside what our preset was then (a latent of 128), at equal minutes under three seeds.

    python -m benchmarks.science.finalists --data ../shared/data/worldtree_srl_train.txt --steps 150 --minutes 10

Every row, science/finalists/<name>-<seed>.json, is a run of benchmarks.science.recipe over the worldtree recipe, whose
schedules span `--steps`; it ends when its minutes of CPU time are over, or after these steps. Rows that have their record are
left as they are, and `--final` held-out sentences are evaluated at the end of each.
"""

from __future__ import annotations

import argparse
import itertools
import sys

from benchmarks.common.records import RESULTS
from benchmarks.science.screens import BASE, CHANGES, run

FINALISTS: dict[str, tuple[str, ...]] = {
    "preset": (),
    "mlp": CHANGES["mlp"],
    "mlp-128": (*CHANGES["mlp"], "model.projector_hidden=128"),
    "mlp-256": (*CHANGES["mlp"], "model.projector_hidden=256"),
    "rate-3e-3": CHANGES["rate-3e-3"],
    "beta-.1": ("train.beta=0.1",),
}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(FINALISTS)}; default: all")
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--final", type=int, default=400, help="held-out sentences that are evaluated at the end")
    options = parser.parse_args()
    for unknown in set(options.names) - set(FINALISTS):
        parser.error(f"no such finalist: {unknown}")
    limits = ["--minutes", str(options.minutes), "--marks", "2", "--final", str(options.final)]
    for seed, name in itertools.product(options.seeds, options.names or FINALISTS):
        changes = [f"train.max_steps={options.steps}", f"train.seed={seed}", *BASE, *FINALISTS[name]]
        run(f"finalists/{name}-{seed}", options.data, changes, limits)
    print(f"records: {RESULTS / 'science' / 'finalists'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
