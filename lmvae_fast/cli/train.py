"""Command ``lmvae-fast train``: a model on sentences, in one process or several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmvae_fast.cli.common import (
    INTERRUPTED,
    Backend,
    DryRun,
    Json,
    column_name,
    console,
    merged,
    notice,
    print_json,
    show_estimate,
)
from lmvae_fast.cli.prompt_data import Layout, MaxPromptLen, TurnEnd, load_pairs, with_lengths

if TYPE_CHECKING:
    from lmvae_fast.config import TrainConfig

SECTIONS = ("model", "train", "data")


def train(
    data: Annotated[
        str | None, typer.Option(help="Sentences: a txt, jsonl, csv, tsv or SRL file; or `corpus`, the bundled one.")
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out sentences; default: 10 % of the data, by seed.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column or field with the sentence (csv, tsv, jsonl).")] = None,
    limit: Annotated[int | None, typer.Option(help="Read at most this many sentences.")] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder of the run: checkpoints, metrics, and `model/` at the end.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="Preset: langvae, optimus, llamavae, cvae or lmvae.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Hugging Face encoder: name or folder.")] = None,
    decoder: Annotated[str | None, typer.Option(help="Hugging Face decoder: name or folder.")] = None,
    latent_dim: Annotated[int | None, typer.Option(help="Width of the latent.")] = None,
    max_len: Annotated[int | None, typer.Option(help="Most tokens per sentence, its end included.")] = None,
    layout: Layout = None,
    turn_end: TurnEnd = None,
    max_prompt_len: MaxPromptLen = None,
    penalty: Annotated[
        str | None, typer.Option(help="With cvae: objective by its published name: DG-VAE, Vanilla, Optimus, ...")
    ] = None,
    annotations: Annotated[
        bool, typer.Option("--annotations", help="Condition on the data's per-word labels.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps; overrides epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sentences per batch.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the KL (the maximum of a schedule).")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    seed: Annotated[
        int | None, typer.Option(max=2**63 - 1, help="Of data order, noise, dropout and initialisation.")
    ] = None,
    on_long: Annotated[str | None, typer.Option(help="Sentences over max_len: truncate, drop or error.")] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", help="Saved model to go on from; model flags given change it (train_decoder, decoder_part ...)."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's last complete checkpoint.")] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Hold the decoder's layers in pieces, one on each process of torchrun.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON with sections model, train and data; flags override.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any field: --set train.grad_clip=0.5 (repeatable).")
    ] = None,
    dry_run: DryRun = False,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Train a language-model VAE on your sentences.

    Checkpoints are written as it goes; Ctrl-C finishes the step, saves and stops (exit code 130), and `--resume` continues
    bit for bit. The finished model is in `OUTPUT/model`.

    Example: `lmvae-fast train --data sentences.txt --encoder bert-base-cased --decoder gpt2 --output runs/first`, or, of
    prompts with responses, `lmvae-fast train --system cvae --data answers.jsonl --decoder runs/sft/model --output runs/cvae`

    In several processes: `torchrun --nproc-per-node 4 -m lmvae_fast.cli train ...` with the same options.
    """
    values = merged(
        config, SECTIONS,
        {
            "model": {
                "system": system, "encoder": encoder, "decoder": decoder, "latent_dim": latent_dim, "max_len": max_len,
                "max_prompt_len": max_prompt_len,
            },
            "train": {
                "output_dir": output, "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size,
                "learning_rate": lr, "beta": beta, "precision": precision, "seed": seed, "on_long": on_long,
                "resume": resume or None, "shard": shard or None,
            },
            "data": {
                "path": data, "eval_path": eval_data, "column": column, "limit": limit, "layout": layout, "turn_end": turn_end,
            },
        },
        set_ or [],
    )  # fmt: skip
    from lmvae_fast.config import LMVAEConfig, TrainConfig

    prompted = _is_prompted(values["model"], start)
    if penalty is not None:
        _with_penalty(values, penalty, prompted)
    with_recipe(values)
    if prompted:
        with_lengths(values)
    train_config = TrainConfig.from_dict({**values["train"], **({"progress": False} if as_json else {})})
    check_output(Path(train_config.output_dir))
    if prompted:
        train_data, held_out = load_pairs(values["data"], values["model"], train_config.seed)
    else:
        train_data, held_out = load_data(values["data"], train_config.seed)
    if annotations:
        # Of both parts: a rare label may stand in the held-out part alone.
        values["model"].setdefault("annotations", sorted({*train_data.label_set(), *held_out.label_set()}))
    model_config = None if start is not None else LMVAEConfig.from_dict(values["model"])

    def build() -> Any:
        from lmvae_fast.models.lmvae import LMVAE

        return LMVAE(model_config) if model_config else LMVAE.from_pretrained(str(start), **values["model"])

    finish(build, train_data, held_out, train_config, backend, as_json, dry_run=dry_run)


def finish(
    build: Callable[[], Any], train_data: Any, held_out: Any, config: TrainConfig, backend: str, as_json: bool, *,
    unit: str = "sentences", dry_run: bool = False,
) -> None:  # fmt: skip
    """Train what ``build`` makes, in one process or several, save it as the run's model, and say how it ended."""
    import torch

    from lmvae_fast.kernels.backend import backend as use_backend
    from lmvae_fast.training.checkpoints.folder import load as load_checkpoint
    from lmvae_fast.training.distributed import Ranks, process_group
    from lmvae_fast.training.loop import train as run_training

    torch.manual_seed(config.seed)
    folder = Path(config.output_dir) / "model"
    with process_group() as device, use_backend(backend):
        ranks = Ranks()
        model = build().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if ranks.first and not as_json:
            console.print(
                f"{len(train_data)} {unit} to train on, {len(held_out)} held out; {trainable:,} parameters train"
            )
        if dry_run:
            from lmvae_fast.training.estimates import estimate_run

            show_estimate(estimate_run(model, train_data, config), model, as_json)
            return
        result = run_training(model, train_data, held_out, config)
        saved = "last"
        if config.final_model == "best" and result.best_checkpoint is not None:
            model.load_trainable_state_dict(load_checkpoint(result.best_checkpoint).tensors["model"])
            saved = f"best, of step {result.best['step']}" if result.best else "best"
        if ranks.first or config.shard:  # pieces come from all processes
            model.save_pretrained(folder)
        ranks.gather(None)  # none leaves before the model is written
    if not ranks.first:
        raise typer.Exit(INTERRUPTED if result.interrupted else 0)
    summary = {
        "stopped": result.stop_reason, "step": result.step, "epoch": round(result.epoch, 3), "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second, "processes": ranks.world, "best": result.best, "model": str(folder),
        "weights": saved,
        "checkpoint": str(result.checkpoint), "trainable_parameters": trainable,
    }  # fmt: skip
    if as_json:
        print_json(summary)
    else:
        console.print(f"{result.stop_reason} at step {result.step}; best evaluation: {result.best}", markup=False)
        console.print(f"model: {folder} (weights: {saved})")
    if result.interrupted:
        notice("continue with --resume")
        raise typer.Exit(INTERRUPTED)


def _is_prompted(model: dict[str, Any], start: str | None) -> bool:
    """Whether the model is one of prompts with responses, by its configuration or that of the one it goes on from."""
    kind, system = model.get("encoder_kind"), model.get("system")
    if start is not None:
        from lmvae_fast.config.base import read_mapping

        file = Path(start) / "config.json"
        saved = read_mapping(file) if file.is_file() else {}
        kind, system = kind or saved.get("encoder_kind"), system or saved.get("system")
    return kind == "decoder_layers" or (kind is None and system == "cvae")


def _with_penalty(values: dict[str, dict], penalty: str, prompted: bool) -> None:
    """Put the fields of a published objective under what was said."""
    from lmvae_fast.errors import ConfigError
    from lmvae_fast.models.systems.cvae import objective_of

    if not prompted:
        raise ConfigError("penalties by name are those of prompts with responses", value=penalty, limit="--system cvae")
    for section, fields in zip(("model", "train"), objective_of(penalty), strict=True):
        values[section] = {**fields, **values[section]}


def with_recipe(values: dict[str, dict]) -> None:
    """Fill a system's own sizes and training recipe, where it has one, under what was said."""
    from lmvae_fast.models.systems import RECIPES
    from lmvae_fast.training.precision import settled

    model, train = RECIPES.get(str(values["model"].get("system")), ({}, {}))
    values["model"] = {**model, **values["model"]}
    values["train"] = {**settled(train), **values["train"]}


def check_output(folder: Path) -> None:
    """Before anything is loaded: the run, and the model at its end, can be written there."""
    from lmvae_fast.models.serialization import check_model_folder
    from lmvae_fast.training.run_checks import check_run_folder

    check_run_folder(folder)
    check_model_folder(folder / "model")


def load_data(options: dict, seed: int):
    """Training and held-out datasets from the ``data`` section."""
    from lmvae_fast.data import generate_corpus, read
    from lmvae_fast.errors import ConfigError

    known = {"path", "eval_path", "column", "limit", "format", "label_column", "header", "delimiter", "held_out"}
    unknown = set(options) - known
    if unknown:
        raise ConfigError("unknown field(s) in section data", value=sorted(unknown), limit=", ".join(sorted(known)))
    if not options.get("path"):
        raise ConfigError("no data", remedy="give --data FILE, or --data corpus for the bundled one")
    keys = ("column", "limit", "format", "label_column", "header", "delimiter")
    reading = {name: options[name] for name in keys if options.get(name) is not None}
    if "column" in reading:
        reading["column"] = column_name(reading["column"])
    if options["path"] == "corpus":
        dataset = generate_corpus(options.get("limit") or 20000, seed=0)
    else:
        dataset = read(options["path"], **reading)
    if options.get("eval_path"):
        return dataset, read(options["eval_path"], **reading)
    return dataset.split(held_out=options.get("held_out", 0.1), seed=seed)
