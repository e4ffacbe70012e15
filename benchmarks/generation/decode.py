"""Decoding, interleaved: the engine against LangVAE 0.6.13, transformers.generate and our eager reference.

    python -m benchmarks.generation.decode langvae [--batches 1 32 256] [--rounds 3]
    python -m benchmarks.generation.decode transformers [--shape llama-160m]
    python -m benchmarks.generation.decode eager
    python -m benchmarks.generation.decode sampling     (what a draw under top-p adds to a step)
    python -m benchmarks.generation.decode body         (the decoder's layers as they are, compiled, with packed weights)
    python -m benchmarks.generation.decode weights      (the engine in fp32, in bf16, and in bf16 with int8 weights)
    python -m benchmarks.generation.decode adapters     (low-rank adapters added to packed weights, and beside plain ones)
    python -m benchmarks.generation.decode calls        (a step's layers in one call, and called one by one from Python)

Every side is a process of its own with the same weights and latents; greedy, 32 tokens, nothing stops early. In fp32 the
tokens of all sides must be the same before anything is timed. Sides take turns, in random order within each round; a
speed-up is the median over rounds of the ratio, of elapsed and of processor time. Besides: seconds until the first token,
the peak memory of each process, and the share of the machine's limit (reading every weight once a step, or the matrix
products, at the rates of the same round). Writes benchmarks/results/generation/<against>.json, of other shapes than GPT-2's
<against>-<shape>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import records
from benchmarks.common.cases import LATENT, MAX_LEN, SHAPES, make_case
from benchmarks.common.langvae_environment import LangVAEMissing, langvae_python, langvae_worker
from benchmarks.common.timing import median_limits, medians, speedups, time_request_and_limits
from benchmarks.common.worker import Worker
from lmvae_fast.data.corpus import generate_corpus
from lmvae_fast.profiling.measure import machine

RESULTS = records.RESULTS / "generation"
OURS = ("-m", "benchmarks.generation.our_side")
# Arguments of our_side by side; "LangVAE" is run by the Python of its own environment.
SIDES: dict[str, dict[str, tuple[str, ...]]] = {
    "langvae": {"engine fp32": ("fp32", "engine"), "engine bf16": ("bf16", "engine")},
    "transformers": {
        "engine fp32": ("fp32", "engine", "prefix"), "transformers fp32": ("fp32", "transformers", "prefix"),
        "engine bf16": ("bf16", "engine", "prefix"), "transformers bf16": ("bf16", "transformers", "prefix"),
    },
    "eager": {"engine fp32": ("fp32", "engine"), "eager fp32": ("fp32", "eager")},
    "sampling": {
        f"{name} {precision}": (precision, form)
        for precision in ("fp32", "bf16") for name, form in (("engine", "engine"), ("greedy", "logits"), ("top-p", "top-p"))
    },
    "weights": {f"engine {weights}": (weights, "engine", "prefix") for weights in ("fp32", "bf16", "int8")},
    "adapters": {f"{form} fp32": ("fp32", {"packed": "engine"}.get(form, form), "adapters") for form in ("packed", "plain")},
    "calls": {
        f"{form} {weights}": (weights, form, "prefix")
        for weights in ("fp32", "bf16", "int8") for form in ("engine", "layers")
    },
    "body": {
        f"{form} {precision}": (precision, {"packed": "engine"}.get(form, form))
        for precision in ("fp32", "bf16") for form in ("packed", "plain", "compiled")
    },
}  # fmt: skip
BASELINES = {
    "langvae": {"engine fp32": "LangVAE", "engine bf16": "LangVAE"},
    "transformers": {"engine fp32": "transformers fp32", "engine bf16": "transformers bf16"},
    "eager": {"engine fp32": "eager fp32"},
    "sampling": {f"{name} {p}": f"top-p {p}" for p in ("fp32", "bf16") for name in ("greedy", "engine")},
    "weights": {"engine bf16": "engine fp32", "engine int8": "engine bf16"},
    "adapters": {"packed fp32": "plain fp32"},
    "calls": {f"engine {weights}": f"layers {weights}" for weights in ("fp32", "bf16", "int8")},
    "body": {f"{form} {p}": f"plain {p}" for p in ("fp32", "bf16") for form in ("packed", "compiled")},
}


def prepare(folder: Path, shape: str, batch: int, threads: int) -> tuple[Path, dict[str, Any]]:
    """The case of the training comparison, with latents and a number of tokens."""
    lines = generate_corpus(num_sentences=2000).texts
    file = make_case(folder, shape, lines, 1, threads)
    case = json.loads(file.read_text())
    latents, decoder = folder / "latents.safetensors", file.parent / "decoder"
    save_file({"z": torch.randn(batch, LATENT, generator=torch.Generator().manual_seed(0))}, latents)
    case |= {"latents": str(latents), "tokens": MAX_LEN, "decoder": str(decoder)}
    file.write_text(json.dumps(case))
    weights = load_file(decoder / "model.safetensors")
    # every matrix once but the position table, and an embedding that is not the head's too
    unread = ("wpe", "embed_tokens") if "lm_head.weight" in weights else ("wpe",)
    read = [value for name, value in weights.items() if value.dim() == 2 and not any(part in name for part in unread)]
    case["weights"] = sum(value.numel() for value in read)
    case["head"] = max(read, key=len).numel()  # the matrix with a row per token
    return file, case


def start(against: str, file: Path) -> dict[str, Worker]:
    """The processes of a comparison."""
    command = [sys.executable, *OURS, str(file)]
    sides = {name: Worker([*command, *arguments], {}, name) for name, arguments in SIDES[against].items()}
    if against == "langvae":
        sides["LangVAE"] = langvae_worker(Path(__file__).with_name("langvae_side.py"), file, {})
    return sides


def measure(sides: dict[str, Worker], against: str, batch: int, rounds: int, case: dict[str, Any]) -> dict[str, Any]:
    """Times of one batch size; SystemExit where fp32 sides disagree about a token. A side's share of the machine's limit is the
    median over rounds of that by the limits of the round."""
    compared = [name for name in sides if not name.endswith(("bf16", "int8"))] if against != "sampling" else []
    tokens = {name: sides[name].ask("ids", batch=batch)["ids"] for name in compared}
    for name in compared[1:]:
        if tokens[name] != tokens[compared[0]]:
            row = next(row for row in range(batch) if tokens[name][row] != tokens[compared[0]][row])
            raise SystemExit(
                f"batch {batch}: {name} decodes other tokens than {compared[0]}, first in sentence {row}: nothing is timed"
            )
    (elapsed, processor), limits = time_request_and_limits(
        sides, "decode", rounds, keys=("seconds", "cpu_seconds"), batch=batch
    )
    # LangVAE has no such option, and a compilation for one token would be another than the one that is measured
    without_first = ("LangVAE", "compiled")
    first = {
        name: round(min(sides[name].ask("decode", batch=batch, tokens=1)["seconds"] for _ in range(3)), 4)
        for name in sides if not name.startswith(without_first)
    }  # fmt: skip
    rates = {name: batch / statistics.median(values) for name, values in elapsed.items()}
    return {
        "batch": batch, "rounds": rounds, "same_tokens_fp32": compared, "seconds": medians(elapsed),
        "all_seconds": {name: [round(value, 4) for value in values] for name, values in elapsed.items()},
        "sentences_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "tokens_per_second": {name: round(MAX_LEN * rate, 1) for name, rate in rates.items()},
        "first_token_seconds": first, "cpu_seconds": medians(processor), "baseline": BASELINES[against],
        "speedup": speedups(elapsed, BASELINES[against]), "cpu_speedup": speedups(processor, BASELINES[against]),
        "limits": median_limits(limits), "share_of_limit": shares_of_rounds(elapsed, batch, case, limits),
    }  # fmt: skip


def shares_of_rounds(
    elapsed: dict[str, list[float]], batch: int, case: dict[str, Any], limits: list[dict[str, float]]
) -> dict[str, float]:
    """Of each side, the median over rounds of its share of the limit."""
    found = [
        limit_share(
            {"batch": batch, "seconds": {name: times[i] for name, times in elapsed.items()}},
            case["weights"], case["head"], limits[i],
        )
        for i in range(len(limits))
    ]  # fmt: skip
    return {name: round(statistics.median(one[name] for one in found), 3) for name in found[0]}


def limit_share(row: dict[str, Any], weights: int, head: int, limits: dict[str, float]) -> dict[str, float]:
    """Share of the limit: the least time of reading the weights once a step, or of multiplying by them, over the time taken.

    The head of the engine's greedy steps is read, and multiplied, in bf16 (kernels/greedy_head).
    """
    shares = {}
    for name, seconds in row["seconds"].items():
        if name.startswith(("engine", "layers", "packed", "plain", "compiled")):
            narrow = name.endswith(("bf16", "int8"))  # int8 weights are multiplied by two bytes a number: bf16's work
            half = weights if narrow else head if name.startswith(("engine", "layers", "packed")) else 0
            whole = weights - half
            rates = limits["matmul_bfloat16_flops_per_s"], limits["matmul_float32_flops_per_s"]
            products = 2 * row["batch"] * (half / rates[0] + whole / rates[1])
            # a copy reads and writes: reading alone is taken to go at its rate
            read = (1 if name.endswith("int8") else 2) * half + 4 * whole
            least = max(read / limits["copy_bytes_per_s"], products)
            shares[name] = round(MAX_LEN * least / seconds, 3)
    return shares


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("against", choices=SIDES)
    parser.add_argument("--shape", default="gpt2-small", choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/generation/<against>.json")
    options = parser.parse_args()
    if options.against == "langvae" and SHAPES[options.shape].family != "gpt2":
        parser.error("the comparison with LangVAE runs GPT-2 shapes")
    if options.against == "langvae":
        try:
            langvae_python()
        except LangVAEMissing as error:
            print(f"comparison with LangVAE 0.6.13 skipped: {error}")
            return 0
    torch.set_num_threads(options.threads)
    name = options.against if options.shape == "gpt2-small" else f"{options.against}-{options.shape}"
    output = options.output or RESULTS / f"{name}.json"
    record: dict[str, Any] = {
        "command": "python -m benchmarks.generation.decode " + " ".join(sys.argv[1:]), "shape": options.shape,
        "tokens": MAX_LEN, "machine": machine("cpu"), "rows": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file, case = prepare(Path(folder), options.shape, max(options.batches), options.threads)
        sides = start(options.against, file)
        for batch in options.batches:
            row = measure(sides, options.against, batch, options.rounds, case)
            # a high-water mark: of this batch and those before it
            row["peak_bytes"] = {name: side.ask("peak")["bytes"] for name, side in sides.items()}
            record["rows"].append(row)
            # after every batch: a run that is stopped leaves those it has measured
            records.write(record, output)
            print(batch, row["sentences_per_second"], row["speedup"], "processor time:", row["cpu_speedup"], flush=True)
        for side in sides.values():
            side.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
