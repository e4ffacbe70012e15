"""Which flow for definition modelling: kind x blocks x hidden x permutation, several seeds; held-out NLL and sense-BLEU.

    python -m benchmarks.science.definitions --model runs/llamavae --data definitions.tsv [--vectors glove] [--seeds 0 1 2]
        [--kinds coupling allinone glow] [--blocks 5 10 20] [--hidden 512] [--permutations hard soft] [--epochs 100]

The words are parted once (80/10/10, by seed 0): every flow is fitted to the training part, stopped by the validation part and
judged on the test part. Posteriors are computed once. Beside the grid: Flow(all), fitted to all parts, and a latent drawn
from the prior in place of T(w), both with the first kind, blocks, hidden and permutation. Writes
benchmarks/results/science/definitions.json after every fit, and goes on from it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.records import RESULTS, load, write
from lmvae_fast.cli.common import load_model
from lmvae_fast.cli.definitions import vector_source
from lmvae_fast.config import FlowConfig, FlowTrainConfig
from lmvae_fast.data import DefinitionDataset, read_definitions
from lmvae_fast.models.systems.invertible_cvae import InvertibleCVAE
from lmvae_fast.probes.definition_evaluation import evaluate_definitions
from lmvae_fast.probes.definition_modelling import sense_bleu
from lmvae_fast.profiling.measure import machine

RECORD = "science/definitions.json"


def grid(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The settings of every fit, by name."""
    axes = (options.kinds, options.blocks, options.hidden, options.permutations, options.seeds)
    for kind, blocks, hidden, permutation, seed in itertools.product(*axes):
        yield {
            "fitted_to": "train", "kind": kind, "blocks": blocks, "hidden": hidden, "permutation": permutation, "seed": seed,
        }  # fmt: skip
    for seed in options.seeds:
        first = {name: getattr(options, name)[0] for name in ("kinds", "blocks", "hidden", "permutations")}
        yield {
            "fitted_to": "all", "kind": first["kinds"], "blocks": first["blocks"], "hidden": first["hidden"],
            "permutation": first["permutations"], "seed": seed,
        }  # fmt: skip


def fit_one(
    vae: Any,
    vectors: Any,
    parts: dict[str, DefinitionDataset],
    settings: dict[str, Any],
    options: argparse.Namespace,
    folder: Path,
) -> dict[str, Any]:
    """One fit and its figures on the test part."""
    torch.manual_seed(settings["seed"])
    config = FlowConfig(
        kind=settings["kind"],
        blocks=settings["blocks"],
        hidden=(settings["hidden"],),
        permutation=settings["permutation"],
    )
    model = InvertibleCVAE(vae, config, vectors=vectors)
    name = "-".join(str(value) for value in settings.values())
    training = FlowTrainConfig(
        output_dir=str(folder / name), epochs=options.epochs, max_steps=options.max_steps, batch_size=options.batch,
        early_stop=options.early_stop, seed=settings["seed"], cache_dir=str(folder / "cache"), tensorboard=False,
        progress=False,
    )  # fmt: skip
    result = model.fit(parts[settings["fitted_to"]], valid=parts["valid"], config=training, missing="skip")
    report = evaluate_definitions(
        model, parts["test"], missing="skip", metrics=("bleu", "encoder_cosine", "nll", "reverse_dictionary")
    )
    curve = [[record["step"], record["nll"]] for record in result.history if record["kind"] == "eval"]
    return {
        **settings, "parameters": model.flow.theta.numel(), "seconds": result.seconds, "steps": result.step,
        "seconds_per_step": result.seconds / max(result.step, 1), "stopped": result.stop_reason, "skipped": result.skipped,
        "validation_nll": curve, "test": {key: float(score) for key, score in report.figures.items()},
        "examples": report.examples(5),
    }  # fmt: skip


def prior_draws(vae: Any, test: DefinitionDataset, seed: int) -> dict[str, float]:
    """The floor: sense-BLEU of glosses decoded from latents drawn from N(0, I), one per word."""
    words = list(dict.fromkeys(test.words))
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(len(words), vae.config.latent_dim, generator=generator).to(vae.device)
    text = dict(zip(words, vae.decode(z), strict=True))
    said = [text[word] for word in test.words]
    return {f"sense_bleu_{way}": float(sense_bleu(said, test.glosses, way)) for way in ("standard", "codwoe")}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained VAE")
    parser.add_argument("--data", type=Path, required=True, help="definitions: tsv, csv, jsonl or CODWOE's json")
    parser.add_argument("--vectors", default="glove")
    parser.add_argument("--kinds", nargs="+", default=["coupling", "allinone", "glow"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 5, 20], help="the first is that of Flow(all)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[512])
    parser.add_argument("--permutations", nargs="+", default=["hard", "soft"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--early-stop", type=int, default=10)
    parser.add_argument("--limit", type=int, help="read at most this many definitions")
    parser.add_argument("--runs", type=Path, help="folder of the runs; default: a temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS / RECORD)
    options = parser.parse_args()
    vae = load_model(options.model)
    vectors = vector_source(options.vectors, vae, None)
    found, _ = read_definitions(options.data, limit=options.limit, on_empty="drop").with_vectors(
        vectors, missing="skip"
    )
    train, valid, test = found.split((0.8, 0.1, 0.1), seed=0)
    parts = {"train": train, "valid": valid, "test": test, "all": found}
    command = f"python -m benchmarks.science.definitions {' '.join(sys.argv[1:])}"
    record: dict[str, Any] = {
        "command": command, "machine": machine("cpu"), "definitions": {name: len(part) for name, part in parts.items()},
        "vectors": vectors.source, "latent_dim": vae.config.latent_dim, "data": found.fingerprint(), "fits": [],
    }  # fmt: skip
    before = load(RECORD) if options.output == RESULTS / RECORD else None
    if before is not None and (before["command"], before["data"]) == (record["command"], record["data"]):
        record = before
    names = next(grid(options)).keys()
    settled = [{name: fit[name] for name in names} for fit in record["fits"]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.runs or Path(temporary)
        record["prior"] = prior_draws(vae, test, seed=0)
        for settings in grid(options):
            if settings in settled:
                continue
            record["fits"].append(fit_one(vae, vectors, parts, settings, options, folder))
            write(record, options.output)
            latest = record["fits"][-1]
            print(
                settings, f"NLL {latest['test']['nll']:.3f}", f"sense-BLEU {latest['test']['sense_bleu_standard']:.4f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
