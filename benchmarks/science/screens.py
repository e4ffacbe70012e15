"""One thing of our preset changed at a time, after equal steps: benchmarks/results/science/screens/<name>.json.

    python -m benchmarks.science.screens --data ../shared/data/worldtree_srl_train.txt [NAME ...]

Every row is a run of benchmarks.science.recipe over the worldtree recipe; rows that have their record are left as they are.
All have a latent of 128 numbers, which the preset had when these screens and the finalists were run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.common.records import RESULTS, load

RECIPE = "examples/recipes/worldtree.yaml"
STEPS = 50
BASE = ("model.projector=linear", "model.latent_dim=128")

#: What is set beside BASE, by the name of the record.
CHANGES: dict[str, tuple[str, ...]] = {
    "preset": (),
    "no-adapters": ("model.train_decoder=false",),
    "random-memory": ("model.memory_init=random",),
    "random-posterior": ("model.posterior_init=random",),
    "mean-memory": ("model.memory_init=mean",),
    "prefix-16": ("model.visibility=prefix", "model.slots=16"),
    "prefix-1": ("model.visibility=prefix", "model.slots=1"),
    "rolling": ("model.visibility=rolling",),
    "mlp": ("model.projector=mlp",),
    "adapter": ("model.visibility=prefix", "model.slots=16", "model.projector=adapter"),
    "rank-4": ("model.lora_rank=4", "model.lora_alpha=8.0"),
    "rank-64": ("model.lora_rank=64", "model.lora_alpha=128.0"),
    "last-layer": ("model.encoder_layer=6",),
    "token-dropout": ("model.token_dropout=0.3",),
    "rate-3e-4": ("train.learning_rate=3e-4",),
    "rate-3e-3": ("train.learning_rate=3e-3",),
    "no-clip": ("train.grad_clip=null",),
    "tuned-encoder": ("model.train_encoder=true",),
    "beta-.1": ("train.beta=0.1",),
    "beta-1": ("train.beta=1.0",),
    "cyclical": ("train.beta=0.1", "train.beta_schedule=cyclical"),
    "free-bits": ("train.beta=1.0", "model.kl_mode=free_bits", "model.kl_target=1.0"),
}


def run(name: str, data: str, changes: list[str], limits: list[str]) -> None:
    """A run of benchmarks.science.recipe, unless it has its record. limits: its options for how long it lasts."""
    record = load(f"science/{name}.json")
    if record is not None and "final" in record:
        return
    settings = ["train.cache_dir=runs/science/cache", "train.save_every=1000", *changes]
    command = [sys.executable, "-m", "benchmarks.science.recipe", RECIPE, "--data", data, *limits, "--name", name]
    subprocess.run([*command, *(part for change in settings for part in ("--set", change))], check=True)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(CHANGES)}; default: all")
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    for unknown in set(options.names) - set(CHANGES):
        parser.error(f"no such change: {unknown}")
    for name in options.names or CHANGES:
        limits = ["--minutes", "60", "--marks", "1", "--final", "200"]
        run(f"screens/{name}", options.data, [*BASE, f"train.max_steps={STEPS}", *CHANGES[name]], limits)
    print(f"records: {RESULTS / 'science' / 'screens'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
