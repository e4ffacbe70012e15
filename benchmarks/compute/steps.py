"""Measured training steps of one pair: LangVAE's way (both models frozen) against Optimus's (everything trains).

    python -m benchmarks.compute.steps          # BERT-base x GPT-2; writes benchmarks/results/compute/steps.json

Both are this package's own steps (random weights: speed does not depend on them), on the same sentences, timed in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import statistics
from typing import Any

from benchmarks.common.records import RESULTS, write
from lmvae_fast.config import LMVAEConfig, TrainConfig
from lmvae_fast.data import generate_corpus
from lmvae_fast.profiling.cost import Cost
from lmvae_fast.profiling.counts import RECIPES, StepShape, count_pair
from lmvae_fast.profiling.measure import interleave, machine, machine_limits, peak_memory, speedup
from lmvae_fast.profiling.presets import build_decoder, build_encoder, random_model
from lmvae_fast.profiling.step import TrainingStep

SYSTEMS = ("langvae", "optimus")


def sentences(count: int, words: int) -> list[str]:
    """Sentences of exactly ``words`` words of the bundled corpus, so that the count on the meta device is of this batch."""
    stream = " ".join(generate_corpus(50 * count, seed=0).texts).split()
    return [" ".join(stream[i * words : (i + 1) * words]) for i in range(count)]


def measure(encoder: str, decoder: str, batch: int, tokens: int, seconds: float) -> dict[str, Any]:
    """Times, memory, FLOPs and the estimates of both systems for one batch size."""
    # every word of the bundled corpus becomes one token; the end token is the last one
    texts = sentences(batch, tokens - 1)
    train = TrainConfig(batch_size=batch, learning_rate=1e-5, beta_schedule="constant", max_steps=10**6)
    rows: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        steps = {}
        for system in SYSTEMS:
            model = random_model(encoder, decoder, LMVAEConfig(system=system, latent_dim=128, max_len=32), texts)
            steps[system] = stack.enter_context(TrainingStep(model, texts, train))
        times = interleave(steps, seconds, "cpu", rounds=3)
        for system, step in steps.items():
            with Cost() as cost:
                step()
            held, extra = step.held_bytes(), peak_memory(step, "cpu")
            length = step.batch().max_seqlen
            estimate = count_pair(
                build_encoder(encoder), build_decoder(decoder), StepShape(batch, length), RECIPES[system]
            )
            median = statistics.median(times[system])
            rows[system] = {
                "seconds": median, "rounds": len(times[system]), "flops": sum(cost.flops.values()),
                "flops_per_s": sum(cost.flops.values()) / median, "held_bytes": held, "extra_bytes": extra,
                "tokens": step.batch().num_tokens, "counted": dataclasses.asdict(estimate),
                "counted_peak_bytes": estimate.peak_bytes,
            }  # fmt: skip
        del steps
    gc.collect()
    ratio = speedup(times, "langvae", "optimus")
    return {"encoder": encoder, "decoder": decoder, "batch": batch, "optimus_over_langvae": ratio, **rows}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="bert-base-cased")
    parser.add_argument("--decoder", default="gpt2")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0, help="per batch size, both systems together")
    options = parser.parse_args()
    record = {
        "command": "python -m benchmarks.compute.steps",
        "machine": machine("cpu"),
        "limits": machine_limits("cpu"),
        "rows": [measure(options.encoder, options.decoder, b, options.tokens, options.seconds) for b in options.batch],
    }
    write(record, RESULTS / "compute" / "steps.json")
    for row in record["rows"]:
        print(f"batch {row['batch']}: langvae {row['langvae']['seconds'] * 1e3:.0f} ms, optimus "
              f"{row['optimus']['seconds'] * 1e3:.0f} ms, {row['optimus_over_langvae']:.2f}x")  # fmt: skip


if __name__ == "__main__":
    main()
