"""The pairs of encoder and decoder that were published, counted under the ways to train them.

    python -m benchmarks.compute.pairs          # writes benchmarks/results/compute/pairs.json

No weights, no data, no download: shapes are in lmvae_fast/profiling/presets.py, and a step is counted on the meta device
(lmvae_fast/profiling/counts.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.common.records import RESULTS, write
from lmvae_fast.profiling.counts import RECIPES, PairCost, StepShape, count_encoder, count_pair, head_geometry
from lmvae_fast.profiling.measure import machine
from lmvae_fast.profiling.presets import DECODERS, build_decoder, build_encoder, preset_config

LANGVAE_PAIRS = tuple(
    itertools.product(
        ("bert-base-cased", "flan-t5-base", "stella-1.5b"),
        ("gpt2", "qwen2.5-3b", "llama-3.2-3b", "mistral-7b-v0.3"),
    )
)
LLAMAVAE_PAIR = ("sentence-t5-base", "llama-7b")
CVAE_DECODER = "llama3-8b"


def rows(pairs: Iterable[tuple[str, str]], shape: StepShape, recipes: Iterable[str]) -> list[dict[str, Any]]:
    """One row per pair: the cost under each recipe."""
    counted = []
    for encoder, decoder in pairs:
        row: dict[str, Any] = {"encoder": encoder, "decoder": decoder}
        for recipe in recipes:
            # built anew: a recipe's switches (dropout, attention) stay with the model
            row[recipe] = _as_json(count_pair(build_encoder(encoder), build_decoder(decoder), shape, RECIPES[recipe]))
        counted.append(row)
    return counted


def _as_json(cost: PairCost) -> dict[str, Any]:
    return {**dataclasses.asdict(cost), "peak_bytes": cost.peak_bytes, "fine_tuned_share": cost.fine_tuned_share}


def published_reduction(counted: list[dict[str, Any]]) -> dict[str, float]:
    """The arithmetic behind "over 95 % fewer parameters": the share that LangVAE trains of each pair with BERT, and the
    mean reduction over the three large decoders."""
    shares = {
        row["decoder"]: row["langvae"]["fine_tuned_share"] for row in counted if row["encoder"] == "bert-base-cased"
    }
    large = [share for decoder, share in shares.items() if decoder != "gpt2"]
    return {
        **{f"share_{name}": share for name, share in shares.items()},
        "mean_reduction_of_large": 1 - statistics.mean(large),
        "reduction_of_gpt2": 1 - shares["gpt2"],
    }


def cvae(shape: StepShape, *, latent_dim: int = 32, slots: int = 4, queries: int = 4) -> dict[str, Any]:
    """CVAE with G-Skip on Llama3-8B (Zhang et al. 2026): parameters from its formulas, FLOPs of its parts.

    Encoder: copies of the first two decoder layers over the sentence and ``queries`` learned tokens, then a norm and two
    linear maps. Adapters: per layer nz -> sqrt(H) -> slots * H, normalised, then that layer's own K and V maps. G-Skip:
    two linear maps and a norm over 32 samples of z per sentence. The decoder is frozen and reads ``slots`` memory slots.
    """
    config = preset_config(CVAE_DECODER, DECODERS)
    width, layers = config.hidden_size, config.num_hidden_layers
    _, kv_heads, head_dim = head_geometry(build_decoder(CVAE_DECODER))
    middle = round(width**0.5)
    two = build_decoder(CVAE_DECODER).model
    two.layers = two.layers[:2]
    copies = sum(parameter.numel() for parameter in two.layers.parameters())
    out = 2 * latent_dim // queries
    head = queries * width + width + (width * width + width) + (width * out + out)
    adapter = layers * ((latent_dim * middle + middle) + (middle * slots * width + slots * width) + width)
    skip = (latent_dim * width + width) + (width * width + width) + width
    encoder_shape = dataclasses.replace(shape, tokens=shape.tokens + queries)
    encoder_flops, encoder_activations = count_encoder(two, encoder_shape, trains=True)
    # the learned head, three products a weight; K and V of the slots, two (their maps are frozen); 32 samples a sentence
    added = 6 * shape.batch * (queries * (head - queries * width) + adapter + 32 * skip)
    added += 4 * shape.batch * slots * layers * 2 * width * kv_heads * head_dim
    frozen = count_pair(
        build_encoder("tiny"), build_decoder(CVAE_DECODER), dataclasses.replace(shape, latent_dim=1),
        dataclasses.replace(RECIPES["langvae"], visibility="prefix", slots=slots),
    )  # fmt: skip
    trainable = copies + head + adapter + skip
    decoder = sum(parameter.numel() for parameter in build_decoder(CVAE_DECODER).parameters())
    return {
        "decoder": CVAE_DECODER, "encoder_parameters": copies + head, "adapter_parameters": adapter,
        "g_skip_parameters": skip, "trainable": trainable, "share_of_decoder": trainable / decoder,
        "flops": encoder_flops + added + frozen.flops, "optimizer_bytes": 8 * trainable,
        "activation_bytes": encoder_activations + frozen.activation_bytes,
        "weight_bytes": 4 * (decoder + trainable),
    }  # fmt: skip


def record(shape: StepShape) -> dict[str, Any]:
    """All that is written to pairs.json."""
    langvae = rows(LANGVAE_PAIRS, shape, ("langvae", "optimus"))
    return {
        "command": "python -m benchmarks.compute.pairs",
        "machine": machine("cpu"),
        "shape": dataclasses.asdict(shape),
        "langvae_pairs": langvae,
        "llamavae_pair": rows([LLAMAVAE_PAIR], shape, ("llamavae", "langvae", "optimus")),
        "cvae": cvae(shape),
        "published_reduction": published_reduction(langvae),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16, help="of each sentence")
    options = parser.parse_args()
    counted = record(StepShape(batch=options.batch, tokens=options.tokens))
    write(counted, RESULTS / "compute" / "pairs.json")
    for row in counted["langvae_pairs"]:
        ours, theirs = row["langvae"], row["optimus"]
        print(f"{row['encoder']} x {row['decoder']}: trains {ours['fine_tuned_share']:.2%} of the pair's parameters, "
              f"{ours['flops'] / theirs['flops']:.1%} of Optimus's FLOPs")  # fmt: skip
    print(counted["published_reduction"])


if __name__ == "__main__":
    main()
