"""The plain conditional baseline of definition modelling: the VAE's head reads the word's vector in place of the encoder's.

    python -m benchmarks.science.from_word_vectors examples/recipes/definitions-llamavae.yaml --data definitions.tsv
        --words 8000 [--vectors glove] [--steps 600]

The same model, training and parts as the VAE of benchmarks.science.definitions; only what the posterior head reads differs: the
word's vector, scaled to a mean length of 1 and padded with zeros to the encoder's width. So a gloss is learnt directly from its
word, without a flow. Adds "conditional" to benchmarks/results/science/definitions.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import lmvae_fast as lf
from benchmarks.common.records import RESULTS, load, write
from benchmarks.science.definitions import RECORD, gloss_nats, parts_of, text_figures, text_part
from lmvae_fast.cli.common import merged
from lmvae_fast.cli.definitions import vector_source
from lmvae_fast.cli.train import SECTIONS, with_recipe
from lmvae_fast.profiling.measure import machine


def features(part: Any, vectors: Any, width: int, scale: float | None = None) -> tuple[torch.Tensor, float]:
    """What the head reads of a part's words ``[N, width]``, and the factor that made their mean length 1."""
    found = torch.from_numpy(part.with_vectors(vectors)[1]).float()
    scale = scale or 1.0 / float(found.norm(dim=1).mean())
    return torch.nn.functional.pad(found * scale, (0, width - found.shape[1])), scale


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="of the VAE that it is compared with")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vectors", default="glove")
    parser.add_argument("--words", type=int)
    parser.add_argument("--text-words", type=int, default=250)
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--runs", type=Path, default=Path("runs/science"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    values = merged(options.recipe, SECTIONS, {"model": {}, "train": {}, "data": {}}, [])
    with_recipe(values)
    folder = options.runs / "definitions-conditional"
    changes = {} if options.steps is None else {"max_steps": options.steps}
    config = lf.TrainConfig.from_dict({
        **values["train"], **changes, "output_dir": str(folder), "tensorboard": False, "progress": False, "resume": True,
    })  # fmt: skip
    vectors = vector_source(options.vectors, None, None)
    parts = parts_of(options, vectors)
    torch.manual_seed(config.seed)
    model = lf.LMVAE(lf.LMVAEConfig.from_dict(values["model"]))
    read, scale = features(parts["train"], vectors, model.encoder.width)
    sentences = model.tokenize(parts["train"].glosses)
    if len(sentences) != len(read):
        raise SystemExit("a gloss was dropped: features would no longer be their words'")
    # The loop asks the model for its encoder's features once, before the first step.
    model.pool = lambda asked, batch_size=64: read  # type: ignore[method-assign]
    result = lf.train(model, sentences, None, config)
    if result.interrupted:
        return 1
    test = text_part(parts["test"], options.text_words)
    with torch.no_grad():
        mu = model.posterior_head(features(test, vectors, model.encoder.width, scale)[0]).chunk(2, dim=-1)[0]
    words = list(dict.fromkeys(test.words))
    text = dict(zip(words, model.decode(mu[[test.words.index(word) for word in words]]), strict=True))
    said = [text[word] for word in test.words]
    record: dict[str, Any] = load(RECORD) or {}
    record["conditional"] = {
        "command": f"python -m benchmarks.science.from_word_vectors {' '.join(sys.argv[1:])}", "machine": machine("cpu"),
        "steps": result.step, "seed": config.seed, "data": parts["all"].fingerprint(),
        "test": {**text_figures(model, said, test), "gloss_nats": gloss_nats(model, list(test.glosses), mu)},
        "examples": [{"word": word, "gloss": test.glosses[test.words.index(word)], "generated": text[word]}
                     for word in words[:5]],
    }  # fmt: skip
    write(record, RESULTS / RECORD)
    print(record["conditional"]["test"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
