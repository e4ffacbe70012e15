"""Time of ops that stand near or below their goal, broken down: a whole call, and its pieces alone.

    python -m benchmarks.kernels.breakdown [--threads 2]

Writes benchmarks/results/kernels/breakdown.json. Medians in microseconds; pieces of an op are timed in turn with each other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.records import RESULTS, write
from benchmarks.kernels import bench_coupling_flow, bench_latent_attention, bench_posterior
from lmvae_fast.kernels.latent_attention.visibility import visibility_code
from lmvae_fast.kernels.posterior import posterior_sample
from lmvae_fast.profiling.measure import interleave, machine


def timed(pieces: dict[str, Callable[[], Any]], rounds: int = 60) -> dict[str, float]:
    """Median microseconds of each piece, all of them once a round."""
    times = interleave(pieces, 0.0, "cpu", rounds=rounds)
    return {name: round(1e6 * statistics.median(values), 1) for name, values in times.items()}


def attention(sentences: int, tokens: int = 13) -> dict[str, Callable[[], Any]]:
    """Forward and backward primitives, prefix, on sentences of one length: few stay in the cache, many do not."""
    heads, width, slots = bench_latent_attention.HEADS, bench_latent_attention.HEAD_DIM, bench_latent_attention.SLOTS
    cu_seqlens = torch.arange(sentences + 1, dtype=torch.int32) * tokens
    grad, *packed = (torch.randn(sentences * tokens, heads, width) for _ in range(4))
    memory = [torch.randn(sentences, heads, slots, width) for _ in range(2)]
    options = (cu_seqlens, visibility_code("prefix"), width**-0.5, tokens, None, None)
    ops = torch.ops.lmvae_fast
    out, stats = ops.latent_attention_fwd(*packed, *memory, *options)
    return {
        "forward": lambda: ops.latent_attention_fwd(*packed, *memory, *options),
        "backward": lambda: ops.latent_attention_bwd(grad, *packed, *memory, out, stats, *options),
    }


def latent_attention() -> dict[str, Any]:
    """Per (sentence, head) and thread: with data in the cache and not, with one thread and several; and the whole call."""
    threads, pairs = torch.get_num_threads(), bench_latent_attention.HEADS
    medians: dict[str, Any] = {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        for name, sentences in (("in cache", 2), ("not in cache", 32)):
            # Alone, so that nothing else takes the cache.
            for piece, function in attention(sentences).items():
                microseconds = timed({piece: function})[piece]
                medians[f"{piece}, {name}, {count} threads, per pair"] = round(
                    microseconds * count / sentences / pairs, 2
                )
    whole = bench_latent_attention._packed("prefix", "cpu", torch.float32, None)
    return {**medians, **timed({"whole call, prefix": whole.ours, "padded, masked SDPA": whole.baseline})}


def posterior() -> dict[str, Any]:
    """The primitives, the whole call, and the whole call on almost nothing."""
    mu, logvar, seed = torch.randn(512, 128), torch.randn(512, 128), torch.tensor([1, 2])
    grad_z, grad_kl = torch.randn(512, 128), torch.randn(512)
    ops = torch.ops.lmvae_fast
    _, kl = ops.posterior_fwd(mu, logvar, seed, 1, 0, 0.0)
    small = [torch.randn(2, 4).requires_grad_() for _ in range(2)]

    def nothing() -> None:
        z, divergence = posterior_sample(*small, seed=None)
        torch.autograd.grad((z, divergence), small, (grad_z[:2, :4], grad_kl[:2]))

    case = bench_posterior.cases("cpu")[0]
    return timed(
        {
            "forward": lambda: ops.posterior_fwd(mu, logvar, seed, 1, 0, 0.0),
            "backward": lambda: ops.posterior_bwd(grad_z, grad_kl, mu, logvar, kl, seed, 1, 0, 0.0),
            "whole call": case.ours, "whole call on [2, 4]": nothing, "eager torch": case.baseline,
        },
        rounds=400,
    )  # fmt: skip


def coupling_flow() -> dict[str, Any]:
    """The whole training step, and its matrix products alone by torch's BLAS at the same shapes (dim 128, hidden 512)."""
    medians: dict[str, Any] = {}
    for batch in (64, 512):
        half, hidden, raw = (torch.randn(batch, n) for n in (64, 512, 128))
        first, second = torch.randn(64, 512), torch.randn(512, 128)

        def products(half=half, hidden=hidden, raw=raw, first=first, second=second, backward: bool = False) -> None:
            for _ in range(10):
                half @ first, hidden @ second
                if backward:
                    raw @ second.t(), hidden @ first.t(), hidden.t() @ raw, half.t() @ hidden

        pieces: dict[str, Callable[[], Any]] = {
            f"batch {batch}: products of the forward, torch": products,
            f"batch {batch}: products of the training step, torch": lambda run=products: run(backward=True),
        }
        for case in bench_coupling_flow.cases("cpu"):
            short = case.name.removeprefix("AllInOneBlock ")
            if case.name.startswith("AllInOne") and short in (
                f"forward, batch {batch}", f"training step, batch {batch}, memory='save'"
            ):  # fmt: skip
                pieces |= {f"{short}: ours": case.ours, f"{short}: {case.baseline_name}": case.baseline}
        medians |= timed(pieces, rounds=30)
    return medians


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels" / "breakdown.json")
    options = parser.parse_args()
    record: dict[str, Any] = {"command": "python -m benchmarks.kernels.breakdown " + " ".join(sys.argv[1:])}
    record["machine"] = machine("cpu")
    for measure in (posterior, latent_attention, coupling_flow):
        torch.manual_seed(0)
        torch.set_num_threads(options.threads)
        record[measure.__name__] = measure()
        print(json.dumps({measure.__name__: record[measure.__name__]}, indent=1))
    write(record, options.output)


if __name__ == "__main__":
    main()
