"""Train a recipe for so many minutes of CPU time and record its held-out figures over these minutes.

    python -m benchmarks.science.recipe examples/recipes/worldtree.yaml --data ../shared/data/worldtree_srl_train.txt

A recipe is what `lmvae-fast train --config` reads: sections `model`, `train` and `data`. Time is the CPU time of the process
with everything that training needs, loading and encoding too, and without the evaluations of the curve itself: the machine may
be shared. At every mark figures of held-out sentences go into benchmarks/results/science/<recipe>.json, and a checkpoint into
--runs, from which the same command goes on after a stop; at the end the model is saved there and all held-out sentences are
evaluated. `--set train.learning_rate=3e-4` changes a field (the name of the record then needs --name). Minutes give another
number of steps on another machine: `--steps` of a record gives its model again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

import lmvae_fast as lf
from benchmarks.common import records
from lmvae_fast.cli.common import merged
from lmvae_fast.cli.train import SECTIONS, load_data, with_recipe
from lmvae_fast.profiling.measure import machine
from lmvae_fast.reports.page import style
from lmvae_fast.training.callbacks import Callback
from lmvae_fast.training.checkpoints import folder as checkpoints

RESULTS = records.RESULTS / "science"
FIGURES = ("reconstruction", "reconstruction_per_token", "kl", "active_units", "bleu", "exact_match")


class Curve(Callback):
    """Held-out figures at marks of CPU time, and the end of the run at the last of them."""

    def __init__(
        self, record: dict[str, Any], file: Path, sentences: Any, marks: list[float], before: float,
        steps: int | None = None,
    ) -> None:  # fmt: skip
        self.record, self.file, self.sentences, self.steps = record, file, sentences, steps
        self.marks = [mark for mark in marks if mark > before]
        self.before, self.evaluating = before, 0.0  # CPU seconds of earlier processes, and of evaluations in this one

    @property
    def seconds(self) -> float:
        """CPU time of training so far, in all processes."""
        return self.before + time.process_time() - self.evaluating

    def on_train_begin(self, run: Any) -> None:
        """See Callback: a run that has had its minutes ends at once, with its last figures."""
        if not self.marks:
            run.request_stop("minutes")

    def on_step(self, run: Any) -> None:
        """See Callback: evaluates where a mark has been reached."""
        if self.steps is not None and run.step >= self.steps:
            run.request_stop("steps")
        if not self.marks or self.seconds < self.marks[0]:
            return
        self.marks = [mark for mark in self.marks if mark > self.seconds]
        # While a run lasts, the frozen matrices are held in the precision it computes in.
        with torch.autocast("cpu", torch.bfloat16, enabled=run.config.precision == "bf16"):
            self.measure(run.model, run.step, run.model.beta)
        if not self.marks:
            run.request_stop("minutes")

    def on_checkpoint(self, run: Any, path: Path) -> None:
        """See Callback: notes the time at which a checkpoint was written, for a run that goes on from it."""
        self.record["checkpoints"][str(run.step)] = self.seconds
        records.write(self.record, self.file)

    def on_log(self, run: Any, figures: dict[str, Any]) -> None:
        """See Callback: keeps the training figures."""
        names = ("step", "loss", "reconstruction", "kl", "grad_norm")
        self.record["training"].append({name: figures[name] for name in names if name in figures})

    def measure(self, model: Any, step: int, beta: float) -> None:
        """One point of the curve, written at once."""
        seconds, started = self.seconds, time.process_time()
        found = lf.evaluate(
            model, self.sentences, metrics=("elbo", "active_units", "bleu", "exact_match"), num_examples=6
        )
        point = {"cpu_minutes": seconds / 60, "step": step, "beta": float(beta)}
        point |= {name: getattr(found, name) for name in FIGURES}
        self.record["points"].append({**point, "examples": found.examples})
        records.write(self.record, self.file)
        draw(self.record, self.file.with_suffix(".svg"))
        print({name: round(value, 3) for name, value in point.items()}, flush=True)
        self.evaluating += time.process_time() - started


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", help="sentences, in place of the recipe's")
    parser.add_argument("--minutes", type=float, default=60.0, help="of CPU time")
    parser.add_argument("--marks", type=int, default=6, help="points of the curve")
    parser.add_argument("--steps", type=int, help="end at this step, though minutes were left")
    parser.add_argument("--held-out", type=int, default=200, help="sentences of a point; the last figures are of all")
    parser.add_argument("--final", type=int, help="sentences of the last figures; default: all held out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--annotations", action="store_true", help="condition on the data's per-word labels")
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--name", help="of the record (screens/x: in a folder); default: the recipe's")
    parser.add_argument("--runs", type=Path, default=Path("runs/science"), help="folder of checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = options.name or options.recipe.stem
    file, folder = RESULTS / f"{name}.json", options.runs / name
    values = merged(
        options.recipe, SECTIONS, {"model": {}, "train": {}, "data": {"path": options.data}}, options.changes
    )
    with_recipe(values)
    config = lf.TrainConfig.from_dict(
        {**values["train"], "output_dir": str(folder), "tensorboard": False, "progress": False, "resume": True}
    )
    torch.manual_seed(config.seed)
    train_set, held_out = load_data(values["data"], config.seed)
    if options.annotations:
        values["model"].setdefault("annotations", sorted({*train_set.label_set(), *held_out.label_set()}))
    model = lf.LMVAE(lf.LMVAEConfig.from_dict(values["model"]))
    record, before = begun(file, folder, options, values)
    record |= {
        "machine": machine("cpu"), "sentences_of_a_point": min(options.held_out, len(held_out)),
        "data": {name: value for name, value in values["data"].items() if not name.endswith("path")},
        "train_sentences": len(train_set), "held_out_sentences": len(held_out),
        "model": values["model"], "train": config.replace(output_dir="runs", cache_dir=None).to_dict(),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }  # fmt: skip
    marks = [60 * options.minutes * (mark + 1) / options.marks for mark in range(options.marks)]
    curve = Curve(record, file, held_out[: options.held_out], marks, before, options.steps)
    sentences = model.tokenize(train_set)
    result = lf.train(model, sentences, None, config, [curve])
    if result.interrupted:
        return 1
    model.save_pretrained(folder / "model")
    found = lf.evaluate(
        model,
        held_out[: options.final],
        metrics=("elbo", "active_units", "mutual_information", "bleu", "exact_match"),
    )
    record["final"] = found.to_dict() | {"steps": result.step, "cpu_minutes": curve.seconds / 60}
    record["interpolations"] = [lf.interpolate(model, *held_out[i : i + 2], steps=5).texts for i in range(0, 8, 2)]
    records.write(record, file)
    print({name: record["final"][name] for name in FIGURES})
    return 0


def draw(record: dict[str, Any], path: Path) -> None:
    """Held-out figures over CPU time."""
    style()
    import matplotlib.pyplot as plt

    titles = {"reconstruction": "reconstruction, nats a sentence", "bleu": "BLEU-4", "kl": "KL, nats"}
    figure, axes = plt.subplots(1, len(titles), figsize=(3.6 * len(titles), 3.2))
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        minutes = [point["cpu_minutes"] for point in record["points"]]
        axis.plot(minutes, [point[name] for point in record["points"]], marker="o", markersize=3)
        axis.set(title=title, xlabel="minutes of CPU time")
        axis.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def begun(
    file: Path, folder: Path, options: argparse.Namespace, values: dict[str, Any]
) -> tuple[dict[str, Any], float]:
    """The record of this run up to its newest checkpoint, and the CPU seconds it has taken; an empty one at its beginning."""
    command = "python -m benchmarks.science.recipe " + " ".join(sys.argv[1:])
    record: dict[str, Any] = {
        "command": command, "seed": values["train"].get("seed", 0), "minutes": options.minutes, "threads": options.threads,
        "points": [], "training": [], "checkpoints": {},
    }  # fmt: skip
    found, old = checkpoints.complete(folder / "checkpoints"), records.load(str(file.relative_to(records.RESULTS)))
    if not found or old is None:
        return record, 0.0
    step = int(found[0].name.split("-")[1].split(".")[0])
    for kind in ("points", "training"):
        record[kind] = [row for row in old[kind] if row["step"] <= step]
    record["checkpoints"] = {at: seconds for at, seconds in old["checkpoints"].items() if int(at) <= step}
    return record, record["checkpoints"].get(str(step), 0.0)


if __name__ == "__main__":
    sys.exit(main())
