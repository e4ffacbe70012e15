"""Each integration's own example, without this package and with it, in turn, in one run.

    python -m benchmarks.integrations.compare langvae|pythae|freia|huggingface|lightning|sentence-transformers
        [--shapes gpt2-small 4x256] [--rounds 5] [--threads N] [--output FILE.json]

- langvae: LangVAE's pipeline, one epoch, and its decode_sentences; the same script here, by `install()`.
- pythae: NormalSampler on the real LangVAE, and on `as_pythae` of the same model.
- freia: FrEIA's quick start (its sizes), with its import lines changed.
- huggingface, lightning: a model of ours under either's Trainer; without this package there is no such model, so `before` is
  the same script with every op in plain torch.
- sentence-transformers: `encode` by the encoder alone with its pooling, and to posterior means on the same encoder.

Every side is a process of its own; before anything is timed they must agree: epoch losses without noise, decoded texts, drawn
token ids, losses, embeddings. LangVAE and pythae's first side run in an environment of their own. Writes
benchmarks/results/integrations/<name>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import records
from benchmarks.common.cases import make_case
from benchmarks.common.environments import PeerMissing, peer_python
from benchmarks.common.langvae_environment import LangVAEMissing, langvae_python, langvae_worker
from benchmarks.common.timing import speedups, time_request
from benchmarks.common.worker import Worker
from lmvae_fast.data.corpus import generate_corpus
from lmvae_fast.profiling.measure import machine

RESULTS = records.RESULTS / "integrations"
HERE = Path(__file__).parent
DIFFERENCE = 1e-4  # the most that numbers may differ, relative to the largest of them


@dataclass(frozen=True)
class Work:
    """One row: what is asked of a side, which of an answer's figures is the time, and how much of it is done."""

    title: str
    request: str
    key: str = "seconds"
    amount: str = "batch {batch}"


@dataclass(frozen=True)
class Plan:
    """An integration: the side that is there without this package, ours with their arguments, and what is timed.

    environment: of our sides, a name of benchmarks/common/environments.py, or "" for this one. script: of the side in
    LangVAE's environment, or "". shapes: the case's sizes matter.
    """

    before: str
    ours: dict[str, tuple[str, ...]]
    works: tuple[Work, ...]
    compared: str
    environment: str = ""
    script: str = ""
    shapes: bool = True


OURS, PLAIN = "ours", "the same, ops in plain torch"
LANGVAE_SIDE, OUR_SIDES = "benchmarks.integrations.our_langvae_side", "benchmarks.integrations.our_sides"
EPOCH = "{sentences} sentences, batch {batch}"
TRAIN = (Work("a training step", "train", "each_seconds"),)
PLANS = {
    "langvae": Plan(
        "LangVAE 0.6.13", {OURS: ("released",), "ours, teacher forcing": ("elbo",)},
        (Work("an epoch's steps", "epoch", "steps_seconds", EPOCH),
         Work("a run of one epoch, files included", "epoch", amount=EPOCH),
         Work("decode_sentences", "decode", amount="{latents} latents")),
        "epoch's loss and texts", script="langvae_side.py",
    ),
    "pythae": Plan(
        "LangVAE 0.6.13", {OURS: ("pythae", "after")}, (Work("NormalSampler", "sample", amount="{latents} draws"),),
        "token ids", environment="pythae", script="pythae_side.py",
    ),
    "freia": Plan(
        "FrEIA 0.2", {"FrEIA 0.2": ("freia", "before"), OURS: ("freia", "after")},
        (*TRAIN, Work("drawing 100 points", "sample", "each_seconds")), "losses of ten steps", shapes=False,
    ),
    "huggingface": Plan(
        PLAIN, {PLAIN: ("huggingface", "before"), OURS: ("huggingface", "after")}, TRAIN, "loss and gradient norm"
    ),
    "lightning": Plan(
        PLAIN, {PLAIN: ("lightning", "before"), OURS: ("lightning", "after")}, TRAIN, "loss and gradient norm",
        environment="frameworks",
    ),
    "sentence-transformers": Plan(
        "its encoder alone", {
            "its encoder alone": ("sentence-transformers", "before"), OURS: ("sentence-transformers", "after")
        }, (Work("encode", "encode", amount=EPOCH),), "embeddings",
    ),
}  # fmt: skip
# Sentences of an epoch, batch, latents decoded at once, steps of a Trainer's run.
SIZES = {"gpt2-small": (32, 8, 32, 3), "4x256": (256, 32, 32, 8), "tiny": (8, 4, 4, 2)}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("integration", choices=PLANS)
    parser.add_argument("--shapes", nargs="+", default=["gpt2-small", "4x256"], choices=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    plan = PLANS[options.integration]
    try:
        python = peer_python(plan.environment) if plan.environment else Path(sys.executable)
        if plan.script:
            langvae_python()
    except (PeerMissing, LangVAEMissing) as error:
        print(f"{options.integration} skipped: {error}")
        return 0
    record: dict[str, Any] = {
        "command": "python -m benchmarks.integrations.compare " + " ".join(sys.argv[1:]), "machine": machine("cpu"),
        "integration": options.integration, "before": plan.before, "compared": plan.compared, "rows": [],
    }  # fmt: skip
    lines = generate_corpus(4000).texts
    output = options.output or RESULTS / f"{options.integration}.json"
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes if plan.shapes else ["tiny"]:
            case = prepared(Path(folder), shape, lines, options.threads)
            record["rows"] += compare(plan, case, python, options.rounds)
            records.write(record, output)
    for row in record["rows"]:
        print(f"{row['case']}, {row['work']}: {row['seconds']} {row['speedup']}")
    return 0


def prepared(folder: Path, shape: str, lines: list[str], threads: int) -> Path:
    """A case's JSON file, with what these examples need beside it."""
    count, batch, latents, steps = SIZES[shape]
    file = make_case(folder, shape, lines, batch, threads)
    case = json.loads(file.read_text())
    file.write_text(json.dumps({**case, "data": lines[:count], "latents": latents, "steps": steps}))
    return file


def compare(plan: Plan, file: Path, python: Path, rounds: int) -> list[dict[str, Any]]:
    """Rows of one case: difference of the sides, times in turn, speed-ups."""
    case = json.loads(file.read_text())
    environment = {"OMP_NUM_THREADS": str(case["threads"]), "HF_HUB_OFFLINE": "1"}
    module = LANGVAE_SIDE if plan.script == "langvae_side.py" else OUR_SIDES
    workers: dict[str, Worker] = {}
    try:
        if plan.script:
            workers[plan.before] = langvae_worker(HERE / plan.script, file, environment)
        for name, arguments in plan.ours.items():
            command = [str(python), "-m", module, str(file), *arguments]
            workers[name] = Worker(command, environment, name, records.ROOT)
        worst = difference(workers[plan.before].ask("check"), workers[OURS].ask("check"))
        rows = []
        for request in dict.fromkeys(work.request for work in plan.works):
            works = [work for work in plan.works if work.request == request]
            found = time_request(workers, request, rounds, keys=tuple(work.key for work in works))
            rows += [row_of(plan, case, work, times) for work, times in zip(works, found, strict=True)]
    finally:
        for worker in workers.values():
            worker.close()
    return [{**row, "difference": worst} for row in rows]


def difference(before: dict[str, Any], after: dict[str, Any]) -> float:
    """The largest difference of two sides' numbers, relative to the largest number; texts and ids must be the same.

    Raises SystemExit where they are not the same work.
    """
    for kind in ("texts", "ids"):
        if before.get(kind) != after.get(kind):
            raise SystemExit(f"the sides disagree, nothing is timed: {before.get(kind)} and {after.get(kind)}")
    want, got = (torch.tensor(side.get("numbers", []), dtype=torch.float64) for side in (before, after))
    if want.shape != got.shape or (not want.numel() and "ids" not in before):
        raise SystemExit(f"the sides have other numbers: {tuple(want.shape)} and {tuple(got.shape)}")
    worst = ((got - want).abs().max() / want.abs().max()).item() if want.numel() else 0.0
    if not worst <= DIFFERENCE:
        raise SystemExit(f"the sides differ by {worst:.1e}, nothing is timed")
    return worst


def row_of(plan: Plan, case: dict[str, Any], work: Work, times: dict[str, list[float]]) -> dict[str, Any]:
    """One row of the record."""
    sides = [name for name in times if name != plan.before]
    baselines = dict.fromkeys(sides, plan.before)
    ratios = {
        side: statistics.quantiles([b / a for a, b in zip(times[side], times[plan.before], strict=True)], n=4)[::2]
        for side in sides
    }  # fmt: skip
    amount = work.amount.format(batch=case["batch"], latents=case["latents"], sentences=len(case["data"]))
    return {
        "work": work.title, "case": f"{case['shape']}, {amount}" if plan.shapes else "its own sizes",
        "rounds": len(times[plan.before]),
        "seconds": {name: float(f"{statistics.median(values):.4g}") for name, values in times.items()},
        "speedup": speedups(times, baselines, 2),
        "quartiles": {side: [round(value, 2) for value in found] for side, found in ratios.items()},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
