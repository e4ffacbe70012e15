"""Probe the models that recipes have trained, on their held-out sentences, and record every figure.

    python -m benchmarks.science.probed minutes/optimus latent_size/64 ... --data ../shared/data/worldtree_srl_train.txt \\
        --sts ../shared/data/stsb_en_dev.csv --linguistic ../shared/data/probing
    python -m benchmarks.science.probed latent_size/32 ... --data FILE --probes overview,disentanglement,reconstruction
    python -m benchmarks.science.probed --draw

A name is that of a record of `python -m benchmarks.science.recipe`, whose model lies in --runs. Sentences are split by the
record's seed, as for training; factors are the presence, number and content of their role labels, so a model that was
conditioned on them has been told some of them. Writes benchmarks/results/science/probes/<name>.json with value, spread and
choices of every figure, and the page beside the model. --draw makes the plots of figures against the size of the latent, and of
how direct interpolations read against how good the texts are.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import lmvae_fast as lf
from benchmarks.common import records
from lmvae_fast.cli.train import load_data
from lmvae_fast.pretrained import load_pretrained
from lmvae_fast.probes.geometry import line
from lmvae_fast.probes.run import probe
from lmvae_fast.profiling.measure import machine
from lmvae_fast.reports import probes as pages
from lmvae_fast.reports.page import style

RESULTS = records.RESULTS / "science"
#: Of the plot: section and figure of a probe's record, and the title of an axis.
PLOTTED = {
    ("disentanglement", "z_diff"): "z-diff (higher)",
    ("disentanglement", "dci_disentanglement"): "DCI disentanglement (higher)",
    ("reconstruction", "bleu"): "BLEU of reconstruction (higher)",
}


def probe_model(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Probe one model; its record."""
    trained = records.load(f"science/{name}.json")
    if trained is None:
        raise SystemExit(f"no record benchmarks/results/science/{name}.json: train it with benchmarks.science.recipe")
    folder = options.runs / name
    model = lf.LMVAE.from_pretrained(folder / "model")
    _, held_out = load_data({**trained.get("data", {}), "path": str(options.data)}, trained["seed"])
    report = probe(
        model, held_out[: options.limit], name=name, cache=folder / "encodings", sts=options.sts, linguistic=options.linguistic,
        probes=options.probes.split(",") if options.probes else None, decoded=options.decoded, vectors=options.vectors,
    ).to_dict()  # fmt: skip
    pages.write(report, folder / "probes.html")
    figures = {
        section: {
            figure: {key: score[key] for key in ("value", "spread", "seed", "choices") if score.get(key) is not None}
            for figure, score in found["scores"].items()
        }
        for section, found in report["sections"].items()
    }
    return {
        "command": "python -m benchmarks.science.probed " + " ".join(sys.argv[1:]),
        "machine": machine("cpu"), "model": trained["model"], "trained_by": trained["command"],
        "steps": trained["final"]["steps"], "trained_cpu_minutes": trained["final"]["cpu_minutes"],
        "data": report["data"], "settings": report["settings"], "figures": figures,
        "skipped": report["skipped"], "seconds": report["seconds"],
        "fluency": fluency(model, held_out),
    }  # fmt: skip


def fluency(model: Any, sentences: Any, paths: int = 40, points: int = 5) -> dict[str, float]:
    """Perplexity a token, by the decoder as it was published, of what the ends of interpolations decode to and their middles.

    Of ``paths`` pairs of sentences that follow each other; ``sentences`` is that of the sentences themselves.
    """
    first, last = (sentences[start : 2 * min(paths, len(sentences) // 2) : 2] for start in (0, 1))
    ways = line(model.encode(first).mu.double().numpy(), model.encode(last).mu.double().numpy(), points)
    texts = [model.decode(torch.from_numpy(ways[point]).float()) for point in range(points)]
    tokenizer = load_pretrained(transformers.AutoTokenizer, model.config.decoder, "decoder tokenizer")
    decoder = load_pretrained(transformers.AutoModelForCausalLM, model.config.decoder, "decoder").eval()
    start = tokenizer.convert_tokens_to_ids(model.config.start_token or tokenizer.eos_token)

    def perplexity(found: list[str]) -> float:
        loss, tokens = 0.0, 0
        for text in filter(None, found):
            ids = torch.tensor([[start, *tokenizer(text, add_special_tokens=False).input_ids]])
            with torch.no_grad():
                logits = decoder(input_ids=ids).logits[0, :-1].float()
            loss += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
        return math.exp(loss / max(1, tokens))

    ends, middle = perplexity(texts[0] + texts[-1]), perplexity(texts[points // 2])
    return {"ends": ends, "middle": middle, "ratio": middle / ends, "paths": len(first),
            "sentences": perplexity([*first.texts, *last.texts])}  # fmt: skip


def draw_sizes(path: Path) -> None:
    """Reconstruction and probes against the size of the latent, after equal steps."""
    found = {}
    for name, record in probed_models("latent_size").items():
        found[record["model"]["latent_dim"]] = record, records.load(f"science/{name}.json")
    sizes = sorted(found)
    panels = {"reconstruction, nats a sentence (lower)": [found[size][1]["final"]["reconstruction"] for size in sizes]}
    spreads: dict[str, list[float]] = {}
    for (section, name), title in PLOTTED.items():
        scores = [found[size][0]["figures"].get(section, {}).get(name) for size in sizes]
        if all(scores):
            panels[title] = [score["value"] for score in scores]
            spreads[title] = [score.get("spread", 0.0) for score in scores]
    style()
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.2))
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        axis.errorbar(sizes, values, yerr=spreads.get(title), marker="o", markersize=4, capsize=3)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("numbers of the latent")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw_consistency(path: Path) -> None:
    """How direct interpolations read against how good the texts are, one point for each probed model."""
    style()
    import matplotlib.pyplot as plt

    panels = {
        "MAUVE of draws from the prior": ("generation", "mauve"),
        "BLEU of reconstruction": ("reconstruction", "bleu"),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.4))
    for axis, (title, (section, name)) in zip(axes, panels.items(), strict=True):
        for place, (model, record) in enumerate(probed_models().items()):
            both = [record["figures"].get(part, {}).get(score, {}).get("value")
                    for part, score in (("interpolation", "smoothness"), (section, name))]  # fmt: skip
            if None not in both:
                axis.scatter(*both, s=28, label=model, marker="osD^vPX*"[place % 8])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("interpolation smoothness")
        axis.margins(0.1)
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def probed_models(folder: str = "") -> dict[str, dict[str, Any]]:
    """Records of probed models by name; those of one folder."""
    root = RESULTS / "probes"
    return {
        str(file.relative_to(root).with_suffix("")): json.loads(file.read_text())
        for file in sorted((root / folder).rglob("*.json"))
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a recipe's record, as latent_size/64")
    parser.add_argument("--data", type=Path, help="sentences with role labels")
    parser.add_argument("--sts", type=Path)
    parser.add_argument("--linguistic", type=Path)
    parser.add_argument("--probes", help="comma-separated; default: all")
    parser.add_argument("--vectors", default="glove", help="word vectors of interpolations")
    parser.add_argument("--limit", type=int, help="held-out sentences; default: all")
    parser.add_argument("--decoded", type=int, default=300, help="sentences decoded, and draws from the prior")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/science"), help="folder of the recipes' runs")
    parser.add_argument("--draw", action="store_true", help="make the plots of what is on record")
    options = parser.parse_args()
    if options.names and options.data is None:
        parser.error("--data: a file of sentences")
    torch.set_num_threads(options.threads)
    for name in options.names:
        record = probe_model(name, options)
        records.write(record, RESULTS / "probes" / f"{name}.json")
        print(name, {figure: round(score["value"], 3) for section in record["figures"].values()
                     for figure, score in section.items() if "value" in score})  # fmt: skip
    if options.draw:
        if probed_models("latent_size"):
            draw_sizes(RESULTS / "latent_size.svg")
        draw_consistency(RESULTS / "consistency.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
