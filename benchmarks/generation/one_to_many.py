"""One-to-many sampling: many responses to each of some prompts, by our engine and by transformers.generate over a static cache.

    python -m benchmarks.generation.one_to_many [--shape smollm2-135m] [--prompts 64] [--samples 32] [--tokens 32] [--rounds 3]

Every side is a process of its own with the same random decoder. Ours is what `lmvae-fast generate --prompts` does:
`PlainDecoder` under `lf.generate`. transformers gets the prompts padded left and `num_return_sequences` samples of each, in
batches of several sizes; the one that is fastest over the first `--warm-up` prompts is timed over all. All draw at temperature
1 under top-p .95, and no response ends early. Before anything is timed both decode the prompts greedily, and their ids must
be equal. Prompts are sentences of the bundled corpus, of different lengths. Writes
benchmarks/results/generation/one_to_many.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

import lmvae_fast as lf
from benchmarks.common.cases import SHAPES, make_decoder_case
from benchmarks.common.records import RESULTS, write
from benchmarks.common.timing import speedups
from benchmarks.common.worker import Worker, serve
from lmvae_fast.data import generate_corpus
from lmvae_fast.profiling.measure import machine, take_turns

FLOOR = 2.5
TOP_P = 0.95


class Ours:
    """The engine."""

    def __init__(self, case: dict) -> None:
        torch.set_num_threads(case["threads"])
        self.case = case
        self.model = lf.PlainDecoder.from_pretrained(case["decoder"], max_len=case["tokens"])
        self.model.decoder.tokenizer.eos_token_id = -1  # no response ends early

    def greedy(self) -> dict:
        """Ids of one greedy response to every prompt."""
        return {"ids": [out.ids for out in self._generate(lf.GenerationConfig(batch_size=self.case["rows"]))]}

    def sample(self, prompts: int) -> dict:
        """All responses to the first prompts."""
        config = lf.GenerationConfig(
            do_sample=True, top_p=TOP_P, seed=0, num_samples=self.case["samples"], batch_size=self.case["rows"]
        )
        return {"responses": len(self._generate(config, prompts))}

    def _generate(self, config: lf.GenerationConfig, count: int | None = None) -> list[Any]:
        prompts = self.case["prompts"][:count]
        return list(lf.generate(self.model, torch.zeros(len(prompts), 0), config, prompts=prompts))


class Theirs:
    """transformers.generate."""

    def __init__(self, case: dict) -> None:
        torch.set_num_threads(case["threads"])
        self.case = case
        self.tokenizer = AutoTokenizer.from_pretrained(case["decoder"], padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(case["decoder"]).eval()

    def greedy(self) -> dict:
        """As ours."""
        return {"ids": self._generate(1, None, do_sample=False)}

    def sample(self, prompts: int) -> dict:
        """As ours."""
        draw = {"do_sample": True, "top_p": TOP_P, "top_k": 0, "temperature": 1.0}
        return {"responses": len(self._generate(self.case["samples"], prompts, **draw))}

    @torch.no_grad()
    def _generate(self, samples: int, count: int | None, **options: Any) -> list[list[int]]:
        found: list[list[int]] = []
        prompts, tokens = self.case["prompts"][:count], self.case["tokens"]
        at_once = max(1, self.case["their_rows"] // samples)
        for start in range(0, len(prompts), at_once):
            given = self.tokenizer(prompts[start : start + at_once], return_tensors="pt", padding=True)
            length = given["input_ids"].shape[1]
            cache = StaticCache(config=self.model.config, max_cache_len=length + tokens)
            out = self.model.generate(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"], past_key_values=cache,
                num_return_sequences=samples, max_new_tokens=tokens, min_new_tokens=tokens,
                pad_token_id=self.tokenizer.pad_token_id, eos_token_id=None, **options,
            )  # fmt: skip
            found += out[:, length:].tolist()
            self.tokenizer.batch_decode(out[:, length:])  # the engine has made its strings already
        return found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The comparison."""
    lines = generate_corpus(4000).texts
    prompts = [" ".join(lines[3 * row : 3 * row + 1 + row % 4]) for row in range(options.prompts)]
    decoder = make_decoder_case(folder, options.shape, lines)
    case = {
        "decoder": str(decoder), "prompts": prompts, "samples": options.samples, "tokens": options.tokens,
        "threads": options.threads, "rows": options.rows, "their_rows": options.their_rows[0],
    }  # fmt: skip
    environment = {"OMP_NUM_THREADS": str(options.threads)}
    sides = {"ours": ("ours", case)}
    sides |= {f"transformers, {rows} rows": ("theirs", {**case, "their_rows": rows}) for rows in options.their_rows}
    workers = {}
    for name, (kind, own) in sides.items():
        file = folder / f"{len(workers)}.json"
        file.write_text(json.dumps(own))
        command = [sys.executable, "-m", "benchmarks.generation.one_to_many", "--side", kind, str(file)]
        workers[name] = Worker(command, environment, name)
    try:
        ids = {name: worker.ask("greedy")["ids"] for name, worker in workers.items()}
        for name, found in ids.items():
            if found != ids["ours"]:
                row = next(row for row, own in enumerate(found) if own != ids["ours"][row])
                raise SystemExit(f"{name} decodes other ids than ours, first for prompt {row}: nothing is timed")
        first = {name: worker.ask("sample", prompts=options.warm_up)["seconds"] for name, worker in workers.items()}
        best = min((name for name in first if name != "ours"), key=first.__getitem__)
        asked = {
            name: functools.partial(workers[name].ask, "sample", prompts=options.prompts) for name in ("ours", best)
        }
        answers = take_turns(asked, options.rounds, discarded=0)  # the first prompts have warmed all sides up
        times = {name: [answer["seconds"] for answer in found] for name, found in answers.items()}
        peaks = {name: worker.ask("peak")["bytes"] for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        "shape": options.shape, "prompts": options.prompts, "samples": options.samples, "tokens": options.tokens,
        "rows": options.rows, "rounds": options.rounds, "baseline": best, "floor": FLOOR,
        "seconds_of_first_prompts": {"prompts": options.warm_up, **{name: round(value, 3) for name, value in first.items()}},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "tokens_per_second": {
            name: round(options.prompts * options.samples * options.tokens / value, 1) for name, value in seconds.items()
        },
        "speedup": speedups(times, {"ours": best}, 2)["ours"], "peak_bytes": peaks,
    }  # fmt: skip


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64, help="our batch")
    parser.add_argument("--their-rows", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--warm-up", type=int, default=4, help="prompts of a first round, which picks their batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "generation" / "one_to_many.json")
    parser.add_argument("--side", nargs=2, metavar=("KIND", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        warnings.filterwarnings("ignore")
        case = json.loads(Path(options.side[1]).read_text())
        serve(Ours(case) if options.side[0] == "ours" else Theirs(case))
        return 0
    torch.set_num_threads(options.threads)
    command = f"python -m benchmarks.generation.one_to_many {' '.join(sys.argv[1:])}".strip()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options, Path(folder))
    write({"command": command, "machine": machine("cpu"), "results": [row]}, options.output)
    print(row["tokens_per_second"], f"{row['speedup']:.2f}x of {row['baseline']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
