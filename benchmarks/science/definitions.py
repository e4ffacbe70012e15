"""Which flow for definition modelling: kind x blocks x hidden x permutation, several seeds; held-out NLL and sense-BLEU.

    python -m benchmarks.science.definitions --data definitions.tsv --words 8000 --write-parts runs/definitions
    python -m benchmarks.science.recipe examples/recipes/definitions-llamavae.yaml --runs runs/science [...]
    python -m benchmarks.science.definitions --data definitions.tsv --words 8000 --model runs/science/definitions/model
        [--vectors glove] [--seeds 0 1 2] [--kinds allinone glow coupling] [--blocks 10 5 20] [--permutations hard soft]

The words that have vectors are drawn and parted once (80/10/10, by seed 0): `--write-parts` writes the parts, of which the VAE
is trained on the first. Every flow is fitted to the training part, stopped by the validation part and judged on the test
part. Posteriors are computed once. The grid is kinds x blocks x permutations at the first hidden width, and kinds x hidden
widths at the first blocks and permutation. Beside it: Flow(all), fitted to all parts, and a latent drawn from the prior in
place of T(w). What is said of texts is of the first `--text-words` test words: BLEU, cosines, and nats of the gold gloss
under the decoder with T(w) as its latent. Writes benchmarks/results/science/definitions.json after every fit, and goes on
from it; benchmarks.science.from_word_vectors adds the conditional baseline.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
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
from lmvae_fast.errors import LatentError, NumericalError
from lmvae_fast.models.modes import evaluating
from lmvae_fast.models.systems.invertible_cvae import InvertibleCVAE
from lmvae_fast.probes.definition_evaluation import DIRECTIONS, evaluate_definitions
from lmvae_fast.probes.definition_modelling import lemma_bleu, sense_bleu
from lmvae_fast.profiling.measure import machine

RECORD = "science/definitions.json"


def grid(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The settings of every fit, by name."""
    kinds, blocks, hidden, permutations = options.kinds, options.blocks, options.hidden, options.permutations
    architectures = [
        *itertools.product(kinds, blocks, hidden[:1], permutations),
        *itertools.product(kinds, blocks[:1], hidden[1:], permutations[:1]),
    ]
    fits = [("train", architecture) for architecture in architectures] + [("all", architectures[0])]
    for seed in options.seeds:
        for fitted_to, architecture in fits:
            named = zip(("kind", "blocks", "hidden", "permutation"), architecture, strict=True)
            yield {"fitted_to": fitted_to, **dict(named), "seed": seed}


def parts_of(options: argparse.Namespace, vectors: Any) -> dict[str, DefinitionDataset]:
    """The definitions of `--words` words that have a vector, drawn and parted by seed 0; "all" is the whole of them."""
    found, _ = read_definitions(options.data, on_empty="drop").with_vectors(vectors, missing="skip")
    words = sorted(set(found.words))
    if options.words is not None and options.words < len(words):
        kept = set(random.Random(0).sample(words, options.words))
        found = found.select([row for row, word in enumerate(found.words) if word in kept])
    return {"all": found, **dict(zip(("train", "valid", "test"), found.split((0.8, 0.1, 0.1), seed=0), strict=True))}


def write_parts(parts: dict[str, DefinitionDataset], folder: Path) -> None:
    """Each part as a table with the columns word and definition."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        with open(folder / f"{name}.tsv", "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, delimiter="\t", lineterminator="\n")
            table.writerow(["word", "definition"])
            table.writerows(zip(part.words, part.glosses, strict=True))


@torch.no_grad()
def gloss_nats(vae: Any, glosses: list[str], z: torch.Tensor, batch: int = 64) -> float:
    """Mean nats of the glosses under the decoder, each with its latent ``[N, latent_dim]``, teacher forced."""
    sentences = vae.tokenize(glosses)
    if len(sentences) != len(glosses):
        raise SystemExit("a gloss was dropped: latents would no longer be their glosses'")
    rows = torch.arange(len(glosses)).split(batch)
    with evaluating(vae):
        return float(torch.cat([vae.score(vae.make_batch(sentences, own), z[own]).double() for own in rows]).mean())


def text_part(test: DefinitionDataset, count: int) -> DefinitionDataset:
    """All glosses of the first so many test words."""
    kept = set(list(dict.fromkeys(test.words))[:count])
    return test.select([row for row, word in enumerate(test.words) if word in kept])


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
    try:
        result = model.fit(parts[settings["fitted_to"]], valid=parts["valid"], config=training, missing="skip")
    except NumericalError as error:  # a finding, too: a coupling without a clamp can take exponentials of anything
        return {**settings, "parameters": model.flow.theta.numel(), "diverged_at": error.step}
    try:
        likely = evaluate_definitions(model, parts["test"], metrics=("nll", "reverse_dictionary"), max_new_tokens=1)
    except LatentError:  # its inverse overflows where no clamp bounds it
        likely = evaluate_definitions(model, parts["test"], metrics=("nll",), max_new_tokens=1)
    part = text_part(parts["test"], options.text_words)
    report = evaluate_definitions(model, part, metrics=("bleu", "encoder_cosine"))
    latents = model.latents(part.with_vectors(vectors)[1])
    figures = {key: float(score) for key, score in {**likely.figures, **report.figures}.items()}
    figures["gloss_nats"] = gloss_nats(vae, list(part.glosses), latents)
    curve = [[record["step"], record["nll"]] for record in result.history if record["kind"] == "eval"]
    return {
        **settings, "parameters": model.flow.theta.numel(), "seconds": result.seconds, "steps": result.step,
        "seconds_per_step": result.seconds / max(result.step, 1), "stopped": result.stop_reason, "skipped": result.skipped,
        "validation_nll": curve, "test": figures, "examples": report.examples(5),
    }  # fmt: skip


def prior_draws(vae: Any, test: DefinitionDataset, seed: int) -> dict[str, float]:
    """The floor: glosses decoded from latents drawn from N(0, I), one per word."""
    words = list(dict.fromkeys(test.words))
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(len(words), vae.config.latent_dim, generator=generator).to(vae.device)
    text = dict(zip(words, vae.decode(z), strict=True))
    place = {word: row for row, word in enumerate(words)}
    said = [text[word] for word in test.words]
    nats = gloss_nats(vae, list(test.glosses), z[[place[word] for word in test.words]])
    return {**text_figures(vae, said, test), "gloss_nats": nats}


def text_figures(vae: Any, said: list[str], part: DefinitionDataset) -> dict[str, float]:
    """BLEU in both directions, and the mean cosine of the encoder's vectors of what was said and of the glosses."""
    keys = [(word, None) for word in part.words]
    figures = {f"sense_bleu_{way}": float(sense_bleu(said, part.glosses, way)) for way in DIRECTIONS}
    figures |= {f"lemma_bleu_{way}": float(lemma_bleu(said, part.glosses, keys, way)) for way in DIRECTIONS}
    with evaluating(vae):
        ours, theirs = (vae.encoder.pool_texts(texts, [len(x) for x in texts]) for texts in (said, list(part.glosses)))
    return {**figures, "encoder_cosine": float(torch.nn.functional.cosine_similarity(ours, theirs).mean())}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a VAE trained on the training part")
    parser.add_argument("--data", type=Path, required=True, help="definitions: tsv, csv, jsonl or CODWOE's json")
    parser.add_argument("--vectors", default="glove")
    parser.add_argument("--kinds", nargs="+", default=["allinone", "glow", "coupling"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 5, 20], help="the first is that of Flow(all)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[512])
    parser.add_argument("--permutations", nargs="+", default=["hard", "soft"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--early-stop", type=int, default=10)
    parser.add_argument("--words", type=int, help="draw this many of the words that have a vector")
    parser.add_argument("--text-words", type=int, default=250, help="test words of the text figures")
    parser.add_argument("--write-parts", type=Path, metavar="FOLDER", help="write the parts as tables, and end")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, help="folder of the runs; default: a temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS / RECORD)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.write_parts is not None:
        write_parts(parts_of(options, vector_source(options.vectors, None, None)), options.write_parts)
        return 0
    if options.model is None:
        parser.error("--model FOLDER, or --write-parts FOLDER first")
    vae = load_model(options.model)
    vectors = vector_source(options.vectors, vae, None)
    parts = parts_of(options, vectors)
    command = f"python -m benchmarks.science.definitions {' '.join(sys.argv[1:])}"
    record: dict[str, Any] = {
        "command": command, "machine": machine("cpu"), "definitions": {name: len(part) for name, part in parts.items()},
        "vectors": vectors.source, "latent_dim": vae.config.latent_dim, "data": parts["all"].fingerprint(), "fits": [],
    }  # fmt: skip
    before = load(RECORD) if options.output == RESULTS / RECORD else None
    if before is not None and (before["command"], before["data"]) == (record["command"], record["data"]):
        record = before
    names = next(grid(options)).keys()
    settled = [{name: fit[name] for name in names} for fit in record["fits"]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.runs or Path(temporary)
        record.setdefault("prior", prior_draws(vae, text_part(parts["test"], options.text_words), seed=0))
        for settings in grid(options):
            if settings in settled:
                continue
            record["fits"].append(fit_one(vae, vectors, parts, settings, options, folder))
            write(record, options.output)
            latest = record["fits"][-1]
            figures = latest.get("test", {"diverged_at": latest.get("diverged_at")})
            print(settings, {key: round(value, 3) for key, value in figures.items()}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
