"""A training step of the CVAE with G-Skip, stage 2: ours against our eager twin, as it is and under torch.compile.

    python -m benchmarks.training.cvae [--data dialogues.txt] [--shape smollm2-135m] [--responses 16] [--rounds 5]

The twin is the public code's formulation: rows padded to one length, logits of every token at once, densities [N M, N, D],
modules one by one; AdamW is torch's fused one on both sides. A step is the responses of one prompt, forward to update.
Every side is a process of its own with the same weights and responses; before anything is timed, losses and norms of
gradients under the same noise are compared. `ours, bf16` trains under precision="bf16"; all others are fp32. Steps are timed
in turn, in random order within each round; peak memory is each process's own. With `--data` (a dialogue a line, utterances
ending in __eou__) prompt and lengths of responses are those of the dialogue that has most to say within the published limits,
otherwise they are sentences of the bundled corpus. Writes benchmarks/results/training/cvae.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.cases import SHAPES, make_decoder_case
from benchmarks.common.records import RESULTS, write
from benchmarks.common.timing import speedups, time_request
from benchmarks.common.worker import Worker
from benchmarks.training.cvae_side import save_both
from lmvae_fast.data import LENGTHS, generate_corpus, read_prompts
from lmvae_fast.profiling.measure import machine

SIDES = {"ours": ("ours",), "ours, bf16": ("bf16",), "eager twin": ("twin",), "torch.compile": ("compiled",)}
LOSS, NORM = 1e-5, 1e-4  # the most that both may differ, relative
SPEEDUP, MEMORY = 3.0, 0.5  # what must be reached


def responses_of(data: str | None, count: int) -> list[tuple[str, str]]:
    """One prompt with so many different responses."""
    if data is None:
        lines = generate_corpus(4000).texts
        return [(" ".join(lines[:6]), f" {line}") for line in lines[10 : 10 + count]]
    pairs = read_prompts(data, layout="dailydialog", turn_end="\n")
    middle = sorted(pairs, key=lambda pair: len(pair.prompt.split()))[len(pairs) // 2]
    others = [pair.response for pair in pairs if pair.response != middle.response]
    step = max(1, len(others) // count)
    return [(middle.prompt, response) for response in others[::step][:count]]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The comparison."""
    pairs = responses_of(options.data, options.responses)
    decoder = make_decoder_case(folder, options.shape, [text for pair in pairs for text in pair] * 20)
    lengths = LENGTHS["dailydialog"]
    case = {
        "decoder": str(decoder), "pairs": pairs, "threads": options.threads, "max_prompt": lengths.prompt,
        "max_response": lengths.response, "ours": str(folder / "ours"),
    }  # fmt: skip
    save_both(case, folder / "released")
    file = folder / "case.json"
    file.write_text(json.dumps(case))
    environment = {"OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, "-m", "benchmarks.training.cvae_side", str(file)]
    sides = {name: SIDES[name] for name in options.sides}
    workers = {name: Worker([*command, *what], environment, name) for name, what in sides.items()}
    try:
        found = {name: workers[name].ask("compare") for name in ("ours", "eager twin")}
        ours, twin = found["ours"], found["eager twin"]
        differences = {name: abs(ours[name] / twin[name] - 1) for name in ("loss", "gradient_norm")}
        if differences["loss"] > LOSS or differences["gradient_norm"] > NORM:
            raise SystemExit(f"the two sides disagree, nothing is timed: {differences}")
        (times,) = time_request(workers, "step", options.rounds)
        peaks = {name: worker.ask("peak")["bytes"] for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    baselines = {name: "eager twin" for name in workers if name != "eager twin"}
    return {
        "shape": options.shape, "responses": len(pairs), "tokens": ours["tokens"], "padded_tokens": twin["tokens"],
        "rounds": options.rounds, "differences": differences, "speedup": speedups(times, baselines, 2),
        "milliseconds": {name: round(1e3 * statistics.median(values), 1) for name, values in times.items()},
        "peak_bytes": peaks, "loaded_bytes": {name: found[name]["loaded_bytes"] for name in found},
        "floor": {"speedup": SPEEDUP, "peak_memory": MEMORY},
    }  # fmt: skip


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="dialogues; default: sentences of the bundled corpus")
    parser.add_argument("--shape", default="smollm2-135m", choices=[name for name in SHAPES if "gpt2" not in name])
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--output", type=Path, default=RESULTS / "training" / "cvae.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    command = f"python -m benchmarks.training.cvae {shlex.join(sys.argv[1:])}".strip()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options, Path(folder))
    write({"command": command, "machine": machine("cpu"), "results": [row]}, options.output)
    for name, value in row["milliseconds"].items():
        speedup = row["speedup"].get(name, 1.0)
        print(f"{name:>14}: {value:9.1f} ms  {row['peak_bytes'][name] / 1e9:5.2f} GB  {speedup:.2f}x of the eager twin")
    return 0


if __name__ == "__main__":
    sys.exit(main())
